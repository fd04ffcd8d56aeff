"""A source to frames: list it, choose frames, decode them where a bad file can do no harm."""
