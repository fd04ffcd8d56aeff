"""Scaling to a million synthetic videos: what grows with their number, and how fast."""
