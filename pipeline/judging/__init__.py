"""Evaluation: benchmarks, judges of answers, and metrics."""
