"""Vision encoding: frames to visual tokens, whose patches are merged, as a language model needs them."""
