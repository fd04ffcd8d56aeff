"""Conversations and tokens to new weights."""
