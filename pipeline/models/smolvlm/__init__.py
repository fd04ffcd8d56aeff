"""SmolVLM2: its language model over stored outputs of its connector."""
