"""The journey of a million videos as `python -m benchmarks.scale`."""

from benchmarks.scale.stages import main

if __name__ == "__main__":
    main()
