"""A million made-up videos: what grows with their number, and how fast."""
