"""Frames to tokens: encode them, merge their patches, keep what a language model needs."""
