"""The command line as `python -m longvlm`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder that this was started in: whatever Python files lie there are not meant

    from longvlm.jobs.cli import main

    main(prog_name="longvlm")
