"""Language models that see videos: what each of them offers, and how a prompt is laid out for it."""
