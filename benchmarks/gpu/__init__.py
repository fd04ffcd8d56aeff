"""Correctness and throughput of every CUDA path in minutes: `python -m benchmarks.gpu`."""
