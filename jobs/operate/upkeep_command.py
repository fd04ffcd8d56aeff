"""The commands `maintain` and `forget`, which look after a store."""

import sys
from typing import TYPE_CHECKING

import click

from longvlm.jobs.cluster.activity import is_shown
from longvlm.jobs.commands import Command
from longvlm.jobs.options import AS_JSON, STORE, StoppedError, say, tell, tell_notes
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    from longvlm.jobs.operate.forget import ForgetOrder

_MOST_SHOWN = 10  # names of videos, before somebody is asked whether they are to be erased


@click.command(
    cls=Command,
    examples=(
        "longvlm maintain --store index",
        "longvlm maintain --store s3://bucket/index --verify",
        "longvlm maintain --store s3://bucket/index --dtype int8",
    ),
)
@STORE
@click.option(
    "--retention-hours",
    type=float,
    default=48.0,
    show_default=True,
    help="How long replaced and abandoned files are kept; 48 at least.",
)
@click.option(
    "--verify", is_flag=True, help="Also read every byte of the tokens: is all there that is said to be live?"
)
@click.option("--repair", is_flag=True, help="Verify, and drop what is damaged: the next runs make it again.")
@click.option(
    "--dtype",
    metavar="D",
    help="int8: instead of all that, store the tokens of the active recipe again in half the bytes, without their "
    "videos, under a recipe of their own, which the command names.",
)
@AS_JSON
def maintain(
    *, store: str, retention_hours: float, verify: bool, repair: bool, dtype: str | None, as_json: bool
) -> None:
    """Merge small files, rewrite those of mostly dead rows, delete what nobody needs any more."""
    if dtype is not None:
        if verify or repair:
            raise InputError("--dtype goes alone; verify or repair the store with a command of its own.")
        _requantise(store, dtype, as_json=as_json)
        return
    from longvlm.jobs.operate.maintain import MaintainOrder, run_maintain
    from longvlm.jobs.terminal import print_report

    order = MaintainOrder(store, retention_hours, verify=verify, repair=repair, show_progress=is_shown())
    report = run_maintain(order)
    counts = report.as_json()
    if report.verified is not None:
        for uri, problem in report.verified.damaged_files.items():
            if as_json:
                tell({"file": uri, "problem": problem}, "file")
            else:
                say(f"damaged: {uri}: {problem}")
        for row in report.verified.problems:
            if as_json:
                tell(row, "video")
            else:
                say(f"wrong: {row['uri']}: {row['table']} {row['problem']}")
    if as_json:
        tell(counts, "summary")
    else:
        counts |= {f"{table}_files_fewer": number for table, number in counts.pop("files_fewer").items()}
        counts.pop("stopped")
        print_report(f"run {counts.pop('run_id')}", counts, {}, report.wall_s)
    tell_notes(report.notes)
    if report.stopped:
        raise StoppedError(f"{report.stopped}.")


def _requantise(store: str, dtype: str, *, as_json: bool) -> None:
    from longvlm.jobs.operate.requantise import RequantiseOrder, run_requantise
    from longvlm.jobs.terminal import print_report

    report = run_requantise(RequantiseOrder(store, dtype, show_progress=is_shown()))
    for row in report.problems:
        if as_json:
            tell(row, "video")
        else:
            say(f"left as it is: {row['uri']}: {row['problem']}")
    counts = report.as_json()
    if as_json:
        tell(counts, "summary")
    else:
        counts.pop("stopped")
        print_report(f"run {counts.pop('run_id')}", counts, {}, report.wall_s)
    tell_notes(report.notes)
    if report.stopped:
        raise StoppedError(f"{report.stopped}.")


@click.command(
    cls=Command,
    examples=(
        "longvlm forget --store index --uri s3://bucket/videos/one.mp4",
        "longvlm forget --store index --file uris.txt --yes",
    ),
)
@STORE
@click.option("--uri", "uris", multiple=True, metavar="U", help="A video, as the column uri names it; may be repeated.")
@click.option("--file", metavar="F", help="Many: a uri a line, or a CSV, JSON or parquet file with a column uri.")
@click.option("--yes", is_flag=True, help="Erase without asking.")
@click.option("--dry-run", is_flag=True, help="Show what would be erased, and erase nothing.")
@AS_JSON
def forget(*, store: str, uris: tuple[str, ...], file: str | None, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Erase videos from every table and every old version, and keep them out while their files remain.

    What would be erased is shown first, and nothing is erased before somebody says yes.
    """
    from longvlm.jobs.operate.forget import find_videos, read_uris, run_forget
    from longvlm.jobs.terminal import print_report

    order = find_videos(store, [*uris, *(read_uris(file) if file else [])])
    if dry_run or not yes:
        _show(order, as_json=as_json and dry_run)
    if dry_run:
        return
    if not yes and not _agreed():
        raise StoppedError("nothing was erased.")
    report = run_forget(order)
    counts = report.as_json()
    if as_json:
        tell(counts)
    else:
        counts |= {f"{table}_rows": number for table, number in counts.pop("rows").items()}
        counts.pop("stopped")
        left = counts.pop("still_there")
        print_report(f"run {counts.pop('run_id')}", counts, {}, report.wall_s)
        for what in left:
            say(f"still there: {what}", err=True)
    tell_notes(report.notes)
    if report.stopped:
        raise StoppedError(f"{report.stopped}.")


def _show(order: "ForgetOrder", *, as_json: bool) -> None:
    """Show what an erasure would take: an object, or lines on stderr where somebody is to be asked."""
    from longvlm.jobs.figures import counted, listed

    foreseen = order.foresee()
    if as_json:
        tell({"videos": len(order.video_ids), "uris": foreseen.uris, "rows": foreseen.rows})
        return
    say(f"To be erased: {counted(len(order.video_ids), 'video')}, in rows: {listed(foreseen.rows)}.", err=True)
    for uri in foreseen.uris[:_MOST_SHOWN]:
        say(f"  {uri}", err=True)
    if (more := len(foreseen.uris) - _MOST_SHOWN) > 0:
        say(f"  and {more:,} more", err=True)
    if order.kept_elsewhere:
        say(f"Mind that {order.kept_elsewhere}.", err=True)


def _agreed() -> bool:
    """Whether a person agrees. Raises InputError where there is none to be asked."""
    if not sys.stdin.isatty():
        raise InputError(
            "nothing was erased, since nobody can be asked here; say --yes to erase, or --dry-run to look."
        )
    return click.confirm("Erase all this for good?", err=True)
