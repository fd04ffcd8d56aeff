"""One command that proves and measures every CUDA path in minutes: `python -m benchmarks.gpu`."""
