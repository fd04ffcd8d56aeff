"""Commands that ask models: answer and compare."""

from typing import Any

import click

from longvlm.jobs.cluster.activity import is_shown
from longvlm.jobs.commands import Command
from longvlm.jobs.options import AS_JSON, MODEL, RAY, STORE, WHERE, hint, stop_if, tell, tell_notes
from longvlm.schemas.errors import InputError

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
    "focus",
    "kept_segments",
    "latency_ms",
    "thinking",
)


@click.command(
    cls=Command,
    examples=(
        'longvlm answer --store index --ask "Does anybody fall?" --type bool --evidence',
        "longvlm answer --store index --questions questions.csv --json",
    ),
)
@STORE
@MODEL
@click.option(
    "--ask", "asked", multiple=True, metavar="Q", help="A question about every selected video; may be repeated."
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["text", "bool", "choice", "number", "json"]),
    help="Of every --ask; default: text.",
)
@click.option(
    "--choices",
    multiple=True,
    metavar="A|B|...",
    help="What every --ask may be answered with, where the type is choice; one each, if repeated.",
)
@click.option(
    "--questions",
    metavar="FILE",
    help="Many questions: CSV, TSV, JSON, JSONL or parquet, or a VideoChatGPT ground-truth JSON.",
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
    type=click.Choice(["question", "even", "auto"]),
    help="Where the budget is less than what is stored: keep the segments nearest to the question, treat all alike, or "
    "let each question decide.",
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
    from longvlm.jobs.answer.run import AnswerOrder, run_answer
    from longvlm.jobs.answer.show import print_answers
    from longvlm.jobs.terminal import print_estimate, print_report
    from longvlm.pipeline.answering.typed import typed_value

    questions = _questions(*(options.pop(name) for name in ("asked", "questions", "kind", "choices")))
    report = run_answer(AnswerOrder(questions=questions, show_progress=is_shown(), **options))
    counts = report.as_json()
    if as_json:
        names = _ANSWER_FIELDS + (("evidence",) if evidence else ())
        for row in () if report.estimate else report.rows():
            shown = {"video": row["uri"], **{name: row[name] for name in names}}
            tell(shown | {"value": typed_value(row["type"], row["value"])}, "answer")
        tell(counts, "summary")
    elif report.estimate:
        print_estimate(counts)
    else:
        print_answers(report.rows(SHOWN_ANSWERS), evidence=evidence)
        hint(max(counts["asked"] - SHOWN_ANSWERS, 0), "answers not shown", "`longvlm sql` has them in the view answers")
        print_report(f"run {counts.pop('run_id')}", counts, report.stages, report.wall_s)
    tell_notes(report.notes)
    if not as_json:
        hint(report.asking.num_not_indexed, "questions about videos that are not indexed", "see `longvlm status`")
        hint(
            report.asking.num_without_recipe,
            "videos not indexed under this model's recipe",
            "`longvlm index --restale` adds them",
        )
    stop_if(report.stopped)


def _questions(asked: tuple[str, ...], file: str | None, kind: str | None, choices: tuple[str, ...]) -> Any:
    """The questions of a command line, as a table."""
    import pyarrow as pa

    from longvlm.pipeline.answering.questions import CHOICE_SEPARATOR, ask, read_questions

    if bool(asked) == (file is not None):
        raise InputError('ask with --ask "...", once or more often, or many questions with --questions FILE.')
    if file is not None:
        if kind or choices:
            raise InputError("--type and --choices go with --ask; a question file has columns type and choices.")
        return read_questions(file)
    listed = tuple(choice.strip() for given in choices for choice in given.split(CHOICE_SEPARATOR))
    return pa.concat_tables([ask(question, kind or "text", listed) for question in asked])
