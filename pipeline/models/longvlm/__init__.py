"""The family LongVLM: a LLaMA with a projector for visual tokens."""
