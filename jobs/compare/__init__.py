"""Transformers' own path beside answers from stored tokens."""
