"""Commands that change what is indexed: index."""

from typing import Any

import click

from longvlm.jobs.cluster.activity import is_shown
from longvlm.jobs.commands import Command
from longvlm.jobs.options import AS_JSON, MODEL, RAY, STORE, hint, say, stop_if, tell, tell_notes
from longvlm.schemas.errors import ANY_CODE, ErrorCode, InputError


@click.command(
    cls=Command,
    examples=(
        "longvlm index videos --store index --model tinyworld",
        "longvlm index s3://bucket/videos --store s3://bucket/index --dry-run --sample 20",
    ),
)
@click.argument("source")
@STORE
@MODEL
@click.option(
    "--recipe", metavar="NAME|FILE", help="paper, long, tiny, or a TOML/JSON file; default: the store's, or long."
)
@click.option("--decode", type=click.Choice(["exact", "keyframe"]), help="Decode every frame, or only keyframes.")
@click.option(
    "--decode-device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: a GPU's own decoder, and the CPU for what it cannot decode, with the same pixels. Tried on no GPU yet.",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Only paths below SOURCE that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No paths below SOURCE that match; may be repeated.")
@click.option(
    "--thumbnails/--no-thumbnails",
    default=None,
    help="Keep a small picture of each segment; default: as the store was told last, else yes.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Index at most this many videos now.")
@click.option(
    "--retry-failed",
    multiple=True,
    is_flag=False,
    flag_value=ANY_CODE,
    type=click.Choice([ANY_CODE, *(code.value for code in ErrorCode)]),
    metavar="[CODE]",
    help="Try videos again that failed before (with CODE, only of that; may be repeated) and have not changed.",
)
@click.option(
    "--restale",
    is_flag=True,
    help="Also index what is stale: under another recipe only, or mistimed.",
)
@click.option("--prune", is_flag=True, help="Delete from the store what the source no longer has.")
@click.option(
    "--allow-mass-delete", is_flag=True, help="Let --prune delete more than a fifth of what is known of the source."
)
@click.option("--max-hours", type=click.FloatRange(min=0, min_open=True), help="End well after so many hours.")
@click.option(
    "--max-failed",
    type=click.FloatRange(0, 1),
    default=0.2,
    show_default=True,
    help="End with exit code 1 when, after 200 outcomes, more than this share failed, and not by the files' own fault.",
)
@click.option("--dry-run", is_flag=True, help="Only say what there is to do and what it would take; change nothing.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --dry-run: really watch N videos at random, keep nothing of them, and project from those.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the draw of --sample; default: 0.")
@click.option(
    "--gpu-price", type=click.FloatRange(min=0), metavar="P", help="Of an hour of a GPU: --sample projects the cost."
)
@click.option("--cpu-price", type=click.FloatRange(min=0), metavar="P", help="Of an hour of a CPU core, likewise.")
@RAY
@AS_JSON
def index(*, source: str, include: tuple[str, ...], exclude: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Watch the videos of SOURCE (a folder, bucket prefix or manifest) once and keep their tokens in the store."""
    from longvlm.jobs.index.order import IndexOrder
    from longvlm.pipeline.source.corpus import Source

    dry_run = options.pop("dry_run")
    asked = {name: options.pop(name) for name in ("sample", "seed", "gpu_price", "cpu_price")}
    order = IndexOrder(Source(source, include, exclude), show_progress=is_shown(), **options)
    if dry_run:
        _forecast(order, asked, as_json=as_json)
        return
    if any(value is not None for value in asked.values()):
        raise InputError("--sample, --seed, --gpu-price and --cpu-price go with --dry-run; add it, or leave them out.")
    _index(order, as_json=as_json)


def _forecast(order: Any, asked: dict[str, Any], *, as_json: bool) -> None:
    """Print what a run would take."""
    from longvlm.jobs.index.forecast import ForecastOrder, forecast, print_forecast

    found = forecast(ForecastOrder(order, **asked))
    if as_json:
        tell(found.as_json())
    else:
        print_forecast(found)
    stop_if(found.stopped)


def _index(order: Any, *, as_json: bool) -> None:
    """Run, and print what came of it."""
    from longvlm.jobs.index.run import run_index
    from longvlm.jobs.terminal import print_report
    from longvlm.pipeline.source.leftovers import describe_left_out

    report = run_index(order)
    counts = report.as_json()
    mostly_failed = counts["mostly_failed"]
    if as_json:
        tell(counts)
    else:
        shown = counts | {"left_out": None, "mostly_failed": None}  # in sentences of their own
        print_report(f"run {shown.pop('run_id')}", shown, report.stages, report.wall_s)
        if report.counts.left_out:
            say(f"left out: {describe_left_out(report.counts.left_out)}")
        hint(
            report.counts.mistimed,
            "of no constant frame rate, indexed by an older version, which took their pictures at the wrong times",
            "--restale indexes them again",
        )
        hint(
            report.counts.stale - report.counts.mistimed,
            "indexed under another recipe only",
            "--restale indexes them under this one too",
        )
        hint(report.counts.known_failed, "known to fail and unchanged", "--retry-failed tries them again")
        hint(report.counts.gone, "gone from the source, still answering", "--prune deletes them")
        hint(report.counts.forgotten, "forgotten", "they are left out as long as their files remain")
        hint(report.out_of_time * report.counts.not_attempted, "not reached in --max-hours", "run it again")
    tell_notes(report.notes)
    if mostly_failed and not as_json:
        say(f"{mostly_failed}.")
    stop_if(report.stopped)
