"""Tokens and questions to answers."""
