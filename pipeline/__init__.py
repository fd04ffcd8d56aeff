"""The operators, in the order of the journey: a source becomes frames, tokens, tables, answers. None knows Ray."""
