"""Training of compressed networks."""
