"""Vision towers, a module a family: frames to patch tokens, as each family's language models read them."""
