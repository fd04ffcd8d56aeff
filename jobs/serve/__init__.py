"""Pages over a store: a server that shows videos, answers and what they rest on, and writes only if told to."""
