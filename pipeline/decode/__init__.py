"""A video file to frames: choose them, and decode them where a bad file can do no harm."""
