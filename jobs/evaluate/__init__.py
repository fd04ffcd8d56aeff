"""The evaluate job: a benchmark or labels to metrics."""
