"""The fault injection as `python -m benchmarks.faults`."""

from benchmarks.faults.gauntlet import main

if __name__ == "__main__":
    main()
