"""Keeping a store small and whole: compact, vacuum, verify, repair, erase."""
