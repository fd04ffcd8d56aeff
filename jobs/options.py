"""What the commands of the command line share: options, what they print, and how a command ends that was stopped."""

import sys
from typing import Any

import click

from longvlm.jobs.cluster.activity import make_room
from longvlm.pipeline.visible import visible

STOPPED = 1  # exit code: a job ended early


def without_secrets(_context: click.Context, _parameter: click.Parameter, address: str) -> str:
    """An address that may stand in logs."""
    from longvlm.pipeline.uris import refuse_secrets

    refuse_secrets(address)
    return address


# environment variables that stand for options
STORE_VARIABLE, MODEL_VARIABLE, RAY_VARIABLES = "LONGVLM_STORE", "LONGVLM_MODEL", ("LONGVLM_RAY_ADDRESS", "RAY_ADDRESS")

STORE = click.option(
    "--store",
    required=True,
    metavar="S",
    envvar=STORE_VARIABLE,
    callback=without_secrets,
    help="Folder or bucket prefix that holds the tables.",
)
MODEL = click.option(
    "--model",
    metavar="M",
    envvar=MODEL_VARIABLE,
    help="Folder or hub id (perhaps @REVISION) of a model, or tinyworld, which is small and knows only its own world; "
    "default: what the store remembers.",
)
WHERE = click.option(
    "--where", metavar="SQL", help="Only videos for which this predicate over the view `videos` holds."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print for machines: JSON, one object a line.")
RAY = click.option(
    "--ray-address",
    metavar="A",
    envvar=RAY_VARIABLES,
    help="A Ray cluster to run on; none: this process alone, without Ray; default: a local Ray for this run.",
)


class StoppedError(Exception):
    """A job that did not end well, in a sentence: exit code 1, after what was finished was kept and printed."""


def stop_if(reason: str | None) -> None:
    """Raise StoppedError where there is a reason why a job that can be gone on with was stopped."""
    if reason:
        raise StoppedError(f"stopped ({reason}); what was finished is kept, the same command goes on from there.")


def say(text: str, *, err: bool = False, keep: str = "") -> None:
    """Print a line for a person, on stdout or stderr, with whatever a terminal would obey written out, but `keep`."""
    make_room()
    # click by itself would go around a stream of ASCII, and ours, which says what that lacks in other words
    click.echo(visible(text, keep), file=sys.stderr if err else sys.stdout, err=err)


def tell(row: dict[str, Any], kind: str | None = None) -> None:
    """Print an object for machines, in one line of JSON.

    Args:
        row: its values as Python has them.
        kind: what it is, where a command prints several kinds.
    """
    from longvlm.pipeline.jsontext import machine_line

    click.echo(machine_line(row if kind is None else {"kind": kind, **row}), file=sys.stdout)


def pass_on(text: str) -> None:
    """Print some of another process's log as it comes, with whatever a terminal would obey written out."""
    make_room()
    click.echo(visible(text, keep="\n"), file=sys.stdout, nl=False)


def tell_notes(notes: list[str]) -> None:
    """What a person should know of a run, on stderr."""
    for note in notes:
        say(f"longvlm: {note}", err=True)


def hint(count: int, what: str, todo: str) -> None:
    """A line about what a person may want to do next, where there is anything to do it about: `gone: 3; do this.`."""
    if count:
        say(f"{what}: {count:,}; {todo}.")
