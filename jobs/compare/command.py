"""The command that compares two paths to an answer: compare."""

from pathlib import Path
from typing import Any

import click

from longvlm.jobs.cluster.activity import is_shown
from longvlm.jobs.commands import Command
from longvlm.jobs.options import AS_JSON, MODEL_VARIABLE, say, tell


@click.command(
    cls=Command,
    examples=(
        "longvlm compare videos --model tinyworld --questions questions.csv",
        "longvlm compare s3://bucket/videos --model path/to/llava --questions q.csv --sample 5 --budgets 512,128",
    ),
)
@click.argument("source")
@click.option(
    "--model",
    required=True,
    metavar="M",
    envvar=MODEL_VARIABLE,
    help="Folder or hub id of a model, or tinyworld.",
)
@click.option(
    "--questions", required=True, metavar="FILE", help="As for answer; right answers, if any, in a column `answer`."
)
@click.option("--sample", type=int, default=10, show_default=True, help="How many videos, drawn at random.")
@click.option(
    "--budgets",
    multiple=True,
    metavar="N,N,...",
    help="Visual tokens of a video; may be repeated. Default: those of 1024,512,128 that the model holds.",
)
@click.option("--recipe", metavar="NAME|FILE", help="As for index; default: long.")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draw.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(), help="Folder for compare.png; default: the current one."
)
@AS_JSON
def compare(*, source: str, budgets: tuple[str, ...], out: Path, as_json: bool, **options: Any) -> None:
    """Ask about some videos of SOURCE through transformers' own path and from stored tokens: what does merging cost?"""
    from longvlm.jobs.compare.report import print_comparison, save_plot
    from longvlm.jobs.compare.run import CompareOrder, read_budgets, run_compare
    from longvlm.jobs.terminal import plot_folder
    from longvlm.pipeline.source.corpus import Source

    named = read_budgets(",".join(budgets)) if budgets else None
    folder = plot_folder(out, "--out")
    comparison = run_compare(CompareOrder(Source(source), budgets=named, show_progress=is_shown(), **options))
    figures = comparison.figures()
    plot = save_plot(figures, folder)
    if as_json:
        for row in comparison.rows():
            tell(row, "answer")
        for row in figures:
            tell(row, "path")
        tell({**comparison.summary(), "plot": plot and str(plot)}, "summary")
    else:
        print_comparison(comparison, plot)
    for skipped in comparison.skipped:
        say("longvlm: skipped {video} ({error_code}): {error}".format(**skipped), err=True)
