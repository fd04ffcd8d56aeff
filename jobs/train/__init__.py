"""Conversations and stored tokens to a model."""
