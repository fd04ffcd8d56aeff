"""Benchmarks, judges and scores."""
