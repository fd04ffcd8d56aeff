"""Fault injection into index runs: a corpus, kinds of faults, and the invariants that must hold afterwards."""
