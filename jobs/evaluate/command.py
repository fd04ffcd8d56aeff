"""The command `evaluate`: scores of a model's answers."""

from pathlib import Path
from typing import Any

import click

from longvlm.jobs.cluster.activity import is_shown
from longvlm.jobs.commands import Command
from longvlm.jobs.options import AS_JSON, MODEL, RAY, STORE_VARIABLE, stop_if, tell, tell_notes, without_secrets
from longvlm.schemas.errors import InputError

TINYWORLD = "tinyworld"


@click.command(
    cls=Command,
    examples=(
        "longvlm evaluate --benchmark tinyworld --seed 2",
        "longvlm evaluate --store index --labels labels.csv --report report",
    ),
)
@click.option(
    "--store",
    default="",
    metavar="S",
    envvar=STORE_VARIABLE,
    callback=without_secrets,
    help="Folder or bucket prefix that holds the tables; default, for tinyworld alone: a temporary one.",
)
@click.option(
    "--benchmark",
    metavar="NAME",
    help="videochatgpt-correctness, -detail, -context, -temporal or -consistency; activitynet-qa, msrvtt-qa, msvd-qa; "
    "or tinyworld, which brings its own videos, and its typed questions: tinyworld-bool, -choice and -number.",
)
@click.option("--questions", metavar="FILE", help="The benchmark's question file, as it is published.")
@click.option("--answers", metavar="FILE", help="Its answer file, where the questions come without answers.")
@click.option(
    "--labels",
    metavar="FILE",
    help="Your own right answers instead: CSV, TSV, JSON, JSONL or parquet with video, question, answer, perhaps type.",
)
@MODEL
@click.option("--budget", type=click.IntRange(min=1), help="Most visual tokens of a video, as for answer.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--judge-url", metavar="URL", help="An OpenAI-compatible API, such as https://HOST/v1, that judges.")
@click.option(
    "--judge-model", metavar="M", help="Its model there; without a URL a folder or hub id. Default: exact match."
)
@click.option("--judge-key-env", metavar="NAME", help="The environment variable with its key; default: OPENAI_API_KEY.")
@click.option("--seed", type=click.IntRange(min=0), help="Of tinyworld; default: 0.")
@click.option("--videos", type=click.IntRange(min=1), help="Of tinyworld; default: 100.")
@click.option(
    "--report", metavar="FOLDER", type=click.Path(path_type=Path), help="Also write report.md and plots there."
)
@RAY
@AS_JSON
def evaluate(*, seed: int | None, videos: int | None, report: Path | None, as_json: bool, **options: Any) -> None:
    """Score a model's answers on a benchmark or on your own labels; nothing is asked or judged twice."""
    from longvlm.jobs.evaluate.report import print_evaluation, save_report
    from longvlm.jobs.evaluate.run import EvaluateOrder, JudgeOrder, run_evaluate
    from longvlm.jobs.terminal import plot_folder

    judge = JudgeOrder(*(options.pop(name) for name in ("judge_url", "judge_model", "judge_key_env")))
    order = EvaluateOrder(judge=judge, show_progress=is_shown(), **options)
    is_tinyworld = (order.benchmark or "").partition("-")[0] == TINYWORLD
    if not is_tinyworld and (seed is not None or videos is not None):
        raise InputError("--seed and --videos are of --benchmark tinyworld; other benchmarks have files.")
    if not is_tinyworld and not order.store:
        raise InputError("name the store whose videos are asked about: --store S.")
    if report is not None:
        plot_folder(report, "--report")
    if is_tinyworld and order.questions is None and order.labels is None:
        from longvlm.jobs.evaluate.tinyworld import TinyWorldSpec, run_tinyworld

        found = run_tinyworld(order, TinyWorldSpec(seed or 0, videos or 100))
    else:
        found = run_evaluate(order)
    saved = save_report(found, report) if report is not None else None
    if as_json:
        tell(found.as_json())
    else:
        print_evaluation(found, saved)
    tell_notes(found.notes)
    stop_if(found.stopped)
