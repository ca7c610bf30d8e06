"""Proof on the exported file."""
