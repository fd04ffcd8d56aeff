"""The command line as `longvlm` and `python -m longvlm`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it in one line even while it is being loaded."""
    try:
        from longvlm.jobs import cli

        cli.main(prog_name="longvlm")
    except KeyboardInterrupt:
        from longvlm.jobs.interrupts import leave

        leave()


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder that this was started in: whatever Python files lie there are not meant
    main()
