"""A source of videos to tokens in a store."""
