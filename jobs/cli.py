"""The command line: each command reads its options, runs one job, prints what came of it. Only this file exits.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from schemas.errors import InputError

STOPPED, WRONG_INPUT = 1, 2  # exit codes; 0 means that everything is accounted for
SHOWN_ANSWERS = 50  # to a person; a machine gets all
_ANSWER_FIELDS = (
    "question_id",
    "question",
    "type",
    "answer",
    "value",
    "confidence",
    "status",
    "error_code",
    "error",
    "num_visual_tokens",
    "latency_ms",
)


class Cli(click.Group):
    """Turns wrong input into one sentence on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"longvlm: {error}", err=True)
            sys.exit(WRONG_INPUT)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="longvlm-index")
def main() -> None:
    """Watch every video of a bucket once; ask anything of what was kept, as often as you like."""


STORE = click.option("--store", required=True, metavar="S", help="Folder or bucket prefix that holds the tables.")
MODEL = click.option("--model", metavar="M", help="Folder or hub id of a model; default: what the store remembers.")
WHERE = click.option(
    "--where", metavar="SQL", help="Only videos for which this predicate over the view `videos` holds."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print for machines: JSON, one object a line.")
RAY = click.option("--ray-address", metavar="A", help="A Ray cluster to run on; default: a local Ray for this run.")


@main.command()
@click.argument("source")
@STORE
@MODEL
@click.option(
    "--recipe", metavar="NAME|FILE", help="paper, long, tiny, or a TOML/JSON file; default: the store's, or long."
)
@click.option("--decode", type=click.Choice(["exact", "keyframe"]), help="Decode every frame, or only keyframes.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only paths below SOURCE that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No paths below SOURCE that match; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), help="Index at most this many videos now.")
@click.option("--retry-failed", is_flag=True, help="Try videos again that failed before and have not changed.")
@click.option("--restale", is_flag=True, help="Also index videos that are indexed under another recipe only.")
@RAY
@AS_JSON
def index(*, source: str, include: tuple[str, ...], exclude: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Watch the videos of SOURCE (a folder, bucket prefix or manifest) once and keep their tokens in the store."""
    from jobs.index import IndexOrder, run_index
    from jobs.report import print_report
    from pipeline.ingest.corpus import Source

    report = run_index(IndexOrder(Source(source, include, exclude), show_progress=not as_json, **options))
    counts = report.as_json()
    if as_json:
        click.echo(json.dumps(counts))
    else:
        print_report(f"run {counts.pop('run_id')}", counts, report.stages, report.wall_s)
        _hint(
            report.counts.stale,
            "videos are indexed under another recipe only; --restale indexes them under this one too",
        )
        _hint(report.counts.known_failed, "videos are known to fail and unchanged; --retry-failed tries them again")
    _exit_if_stopped(report.stopped)


@main.command()
@STORE
@MODEL
@click.option("--ask", metavar="Q", help="One question, about every selected video.")
@click.option(
    "--type", "kind", type=click.Choice(["text", "bool", "choice", "number", "json"]), help="Of --ask; default: text."
)
@click.option("--choices", metavar="A,B,...", help="What --ask may be answered with, where its type is choice.")
@click.option(
    "--questions", metavar="FILE", help="Many questions: JSONL, CSV, parquet or a VideoChatGPT ground-truth JSON."
)
@WHERE
@click.option("--limit", type=click.IntRange(min=1), help="Ask about at most this many videos.")
@click.option(
    "--dry-run", is_flag=True, help="Only say what would be asked, how many tokens that is, how long it takes."
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    help="Most visual tokens of a video; default: as stored, merged further only if the model's context needs it.",
)
@click.option("--tokens-per-segment", type=click.IntRange(min=1), help="Most visual tokens of a segment.")
@click.option(
    "--focus",
    type=click.Choice(["question", "even"]),
    help="Where the budget cannot hold all segments: keep those nearest to the question, or merge neighbours.",
)
@click.option("--template", metavar="T", help="Prompt template; default: the model's own.")
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 decodes greedily.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--kv-gb",
    type=click.FloatRange(min=0, min_open=True),
    help="Memory for keys and values, per model; default: what its device has to spare.",
)
@click.option("--evidence", is_flag=True, help="Say with each answer which seconds it leans on.")
@RAY
@AS_JSON
def answer(*, evidence: bool, as_json: bool, **options: Any) -> None:
    """Answer questions about the videos of a store from their tokens; no video is opened."""
    from jobs.answer import AnswerOrder, run_answer
    from jobs.report import print_answers, print_estimate, print_report

    asked = _asked(*(options.pop(name) for name in ("ask", "questions", "kind", "choices")))
    report = run_answer(AnswerOrder(questions=asked, show_progress=not as_json, **options))
    counts = report.as_json()
    if as_json:
        names = _ANSWER_FIELDS + (("evidence",) if evidence else ())
        for row in () if report.estimate else report.rows():
            click.echo(json.dumps({"video": row["uri"], **{name: row[name] for name in names}}))
        click.echo(json.dumps(counts))
    elif report.estimate:
        print_estimate(counts)
    else:
        print_answers(report.rows(SHOWN_ANSWERS), evidence=evidence)
        _hint(
            max(counts["asked"] - SHOWN_ANSWERS, 0), "answers are not shown; `longvlm sql` has them in the view answers"
        )
        print_report(f"run {counts.pop('run_id')}", counts, report.stages, report.wall_s)
    for note in report.notes:
        click.echo(f"longvlm: {note}", err=True)
    if not as_json:
        _hint(report.asking.num_not_indexed, "questions are about videos that are not indexed; see `longvlm status`")
        _hint(
            report.asking.num_without_recipe,
            "videos are not indexed under this model's recipe; `longvlm index --restale` adds them",
        )
    _exit_if_stopped(report.stopped)


def _asked(ask: str | None, questions: str | None, kind: str | None, choices: str | None) -> Any:
    """The questions of a command line, as a table."""
    from pipeline.language.questions import ask as one_question
    from pipeline.language.questions import read_questions

    if (ask is None) == (questions is None):
        raise InputError('ask one question with --ask "..." or many with --questions FILE.')
    if questions is not None:
        if kind or choices:
            raise InputError("--type and --choices go with --ask; a question file has columns type and choices.")
        return read_questions(questions)
    listed = tuple(choice.strip() for choice in choices.split(",")) if choices else ()
    return one_question(ask or "", kind or "text", listed)


@main.command()
@STORE
@click.argument("query")
@AS_JSON
def sql(*, store: str, query: str, as_json: bool) -> None:
    """Run one SELECT over the views: videos, segments, tokens, answers, failures, recipes, runs."""
    from jobs.report import print_rows
    from pipeline.store import catalog
    from pipeline.store.ledger import Store

    rows = catalog.query(catalog.connect(Store.open(store).pin()), query)
    if as_json:
        for row in rows.to_pylist():
            click.echo(json.dumps(row, default=_plain))
    else:
        print_rows(rows.to_pylist())


@main.command()
@STORE
@click.argument("text")
@WHERE
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="How many segments to show.")
@AS_JSON
def search(*, store: str, text: str, where: str | None, limit: int, as_json: bool) -> None:
    """Find the segments whose frames look most like TEXT says."""
    from jobs.inquiry import find_segments
    from jobs.report import print_rows

    found = find_segments(store, text, limit=limit, where=where)
    if as_json:
        for hit in found.rows:
            click.echo(json.dumps(asdict(hit)))
        click.echo(json.dumps({"num_scanned": found.num_scanned, "bytes_scanned": found.bytes_scanned}))
    else:
        print_rows([asdict(hit) for hit in found.rows])
        click.echo(f"scanned {found.num_scanned} segments, {found.bytes_scanned / 1e6:.1f} MB")


@main.command()
@STORE
@AS_JSON
def status(*, store: str, as_json: bool) -> None:
    """What a store holds: videos by status, segments, bytes of tokens, recipes, the last run."""
    from jobs.inquiry import describe_store
    from jobs.report import print_status

    described = describe_store(store)
    if as_json:
        click.echo(json.dumps(described))
    else:
        print_status(described)


@main.group()
def recipe() -> None:
    """List the recipes of a store, or choose the one that its views show."""


@recipe.command("list")
@STORE
@AS_JSON
def recipe_list(*, store: str, as_json: bool) -> None:
    """The recipes that a store holds tokens of."""
    from jobs.inquiry import list_recipes
    from jobs.report import print_status
    from pipeline.store.ledger import Store

    recipes = list_recipes(Store.open(store))
    if as_json:
        for stored in recipes:
            click.echo(json.dumps(stored))
    else:
        print_status({"recipes": recipes})


@recipe.command("promote")
@STORE
@click.argument("name")
def recipe_promote(*, store: str, name: str) -> None:
    """Make the recipe NAME (or its fingerprint) the one that all views show; promote another to switch back."""
    from pipeline.store.catalog import write_index_duckdb
    from pipeline.store.ledger import Store

    opened = Store.open(store)
    opened.promote(name)
    write_index_duckdb(opened.uri, opened.pin())
    click.echo(f"the views of {store} now show the recipe {name}")


@main.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where to leave videos, model and store; default: a new temporary folder.",
)
def demo(*, folder: Path | None) -> None:
    """Make six small videos, index them, ask about them and print the answers: on a CPU, with nothing downloaded."""
    from jobs.demo import run_demo

    run_demo(folder)


@main.command()
@click.argument("source")
@click.option("--model", required=True, metavar="M", help="Folder or hub id of a LLaVA or LongVLM.")
@click.option(
    "--questions", required=True, metavar="FILE", help="As for answer; right answers, if any, in a column `answer`."
)
@click.option("--sample", type=int, default=10, show_default=True, help="How many videos, drawn at random.")
@click.option(
    "--budgets",
    metavar="N,N,...",
    help="Visual tokens of a video; default: those of 1024,512,128 that the model holds.",
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
def compare(*, source: str, budgets: str | None, out: Path, as_json: bool, **options: Any) -> None:
    """Ask about some videos of SOURCE through transformers' own path and from stored tokens: what does merging cost?"""
    from jobs.compare import CompareOrder, read_budgets, run_compare
    from jobs.comparison import plot_folder, print_comparison, save_plot
    from pipeline.ingest.corpus import Source

    named = None if budgets is None else read_budgets(budgets)
    folder = plot_folder(out)
    comparison = run_compare(CompareOrder(Source(source), budgets=named, show_progress=not as_json, **options))
    figures = comparison.figures()
    plot = save_plot(figures, folder)
    if as_json:
        for row in (*comparison.rows(), *figures, {**comparison.summary(), "plot": plot and str(plot)}):
            click.echo(json.dumps(row))
    else:
        print_comparison(comparison, plot)
    for skipped in comparison.skipped:
        click.echo("longvlm: skipped {video} ({error_code}): {error}".format(**skipped), err=True)


def _plain(value: Any) -> str:
    """What JSON has no type for: blobs in base64, times as ISO 8601."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _hint(count: int, what: str) -> None:
    if count:
        click.echo(f"{count} {what}.")


def _exit_if_stopped(reason: str | None) -> None:
    if reason:
        click.echo(
            f"longvlm: stopped ({reason}); what was finished is kept, the same command goes on from there.", err=True
        )
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
