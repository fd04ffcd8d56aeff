"""The LLaVA family of transformers: 1.5, NeXT-Video and OneVision."""
