"""Inference over shared prefixes: requests in, answers out."""
