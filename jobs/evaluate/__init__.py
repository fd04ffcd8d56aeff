"""A benchmark or labels to figures."""
