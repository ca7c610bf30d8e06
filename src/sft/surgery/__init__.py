"""Changes to models: always on a copy."""
