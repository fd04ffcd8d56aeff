"""Qwen3-VL: its language model over stored outputs of its vision merger."""
