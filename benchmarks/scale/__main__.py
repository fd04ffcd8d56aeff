"""The scaling benchmark as `python -m benchmarks.scale`."""

from benchmarks.scale.stages import main

if __name__ == "__main__":
    main()
