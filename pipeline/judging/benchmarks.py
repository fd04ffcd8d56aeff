"""Evaluation benchmarks: published question and answer files, or somebody's labels, as one table of items."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from longvlm.pipeline.answering.questions import QUESTION_COLUMNS, TEXTS, check_texts
from longvlm.pipeline.judging.agreement import RIGHT_ANSWER, right_value
from longvlm.pipeline.table_files import Column, Columns, read_batches
from longvlm.pipeline.text_files import UserFile
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import QUESTIONS

ITEMS = pa.schema(  # one row a question of a benchmark
    [
        *QUESTIONS,  # `video` is never null
        ("question2", pa.string()),  # the same in other words; null but for consistency
        ("answer", pa.string()),  # the right one, never null
        ("kind", pa.string()),  # a group to count apart, if the file has any
    ]
)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: what is asked, and in which dimension answers are judged."""

    name: str  # as it stands in verdicts
    dimension: str = "qa"
    video_prefix: str = ""  # of videos' file names, where the question file names them without
    is_typed: bool = False  # `type` says how a question is answered, as in question files; else a kind of question
    file_kind: str = "question file"  # what sentences call its file

    @property
    def is_paired(self) -> bool:
        """Whether every question is asked twice, in other words."""
        return self.dimension == "consistency"

    @property
    def needs_model(self) -> bool:
        """Whether only a model can judge: free answers are never equal to the right ones."""
        return self.dimension != "qa"


TINYWORLD = Benchmark("tinyworld", is_typed=True)  # its questions as text; `tinyworld-bool` and so on are typed ones
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        *(
            Benchmark(f"videochatgpt-{dimension}", dimension)
            for dimension in ("correctness", "detail", "context", "temporal", "consistency")
        ),
        Benchmark("activitynet-qa", video_prefix="v_"),
        Benchmark("msrvtt-qa", video_prefix="video"),
        Benchmark("msvd-qa", video_prefix="vid"),
        TINYWORLD,
        *(Benchmark(f"{TINYWORLD.name}-{answer}", is_typed=True) for answer in ("bool", "choice", "number")),
    )
}

_COLUMNS: Columns = {
    **QUESTION_COLUMNS,
    "question_id": Column(("question_id", "id")),
    "question": Column(("question", "Q", "Q1"), "text", required=True),
    "question2": Column(("question2", "Q2"), "text"),
    "answer": RIGHT_ANSWER,
    "kind": Column(("kind",)),
}
_PUBLISHED: Columns = {
    **{name: column for name, column in _COLUMNS.items() if name not in ("type", "choices", "schema")},
    "kind": Column(("kind", "type")),
}


def labels_benchmark(path: str) -> Benchmark:
    """The benchmark of somebody's own labels, named after their file."""
    return Benchmark(f"labels:{PurePosixPath(path).stem}", is_typed=True, file_kind="label file")


def read_items(benchmark: Benchmark, questions: str, answers: str | None = None) -> pa.Table:
    """A benchmark's questions with their right answers, as a table of ITEMS in the order of the file.

    Args:
        benchmark: says what columns mean.
        questions: JSONL, JSON, CSV or parquet. Rows have `question` (or `Q`, `Q1`), `video` (or `video_id`,
            `video_name`) and `answer` (or `A`), for consistency `question2` (or `Q2`), and may have `question_id` (or
            `id`) and `kind`.
        answers: a file of rows `question_id`, `answer` and perhaps `type`, for questions that come without answers.

    Raises:
        InputError: a file cannot be read or is empty, or a row lacks something; it names file, row and field.
    """
    columns = _COLUMNS if benchmark.is_typed else _PUBLISHED
    own = columns if answers is None else {name: columns[name] for name in columns if name not in ("answer", "kind")}
    file = UserFile(questions, benchmark.file_kind)
    pieces: list[pa.Table] = []
    num_rows = 0
    for batch in read_batches(file, own):
        pieces.append(_items(batch, file, num_rows))
        num_rows += len(batch)
    if not num_rows:
        raise InputError(f"{file} holds no questions.")
    items = pa.concat_tables(pieces)
    if answers is not None:
        items = _with_answers(items, file, UserFile(answers, "answer file"), columns)
    for field in ("video", "answer", *(["question2"] if benchmark.is_paired else [])):
        _require(items, field, file, columns)
    if benchmark.is_typed:
        _check_answers(items, file)
    return items


def _items(batch: pa.RecordBatch, file: UserFile, rows_before: int) -> pa.Table:
    def column(name: str) -> pa.Array:
        found = batch.column(name) if name in batch.schema.names else pa.nulls(len(batch), pa.string())
        return (
            pc.if_else(pc.equal(found, ""), pa.scalar(None, pa.string()), found) if name not in TEXTS.names else found
        )

    texts = pa.RecordBatch.from_pydict({name: column(name) for name in TEXTS.names})
    table = check_texts(texts, file.row, rows_before)
    for name in ("question2", "answer", "kind"):
        table = table.append_column(name, column(name))
    return table.cast(ITEMS)


def _with_answers(items: pa.Table, questions: UserFile, answers: UserFile, columns: Columns) -> pa.Table:
    """The items with answers and kinds from a file of their own, found by question_id."""
    _require(items, "question_id", questions, columns)
    by_id = dict(_answers_by_id(answers, {name: columns[name] for name in ("question_id", "answer", "kind")}))
    found = [by_id.get(question_id) for question_id in items["question_id"].to_pylist()]
    if None in found:
        place = found.index(None)
        raise InputError(
            f"{questions.row(place)} has the question_id {items['question_id'][place].as_py()!r}, which {answers} has "
            "not; name the answers that belong to these questions."
        )
    for place, field in enumerate(("answer", "kind")):
        items = _replaced(items, field, pa.array([pair[place] for pair in found if pair], pa.string()))
    return items


def _answers_by_id(file: UserFile, columns: Columns) -> Iterator[tuple[str, tuple[str, str | None]]]:
    seen: set[str] = set()
    rows = (row for batch in read_batches(file, columns) for row in batch.to_pylist())
    for place, row in enumerate(rows):
        for field in ("question_id", "answer"):
            if not row[field]:
                raise _lacking(file.row(place), field, columns)
        if row["question_id"] in seen:
            raise InputError(f"{file.row(place)} answers the question {row['question_id']!r} once more.")
        seen.add(row["question_id"])
        yield row["question_id"], (row["answer"], row["kind"])


def _require(items: pa.Table, field: str, file: UserFile, columns: Columns) -> None:
    """Raise InputError for the first row that lacks a field."""
    place = pc.index(pc.is_null(items[field]), value=True).as_py()
    if place >= 0:
        raise _lacking(file.row(place), field, columns)


def _lacking(row: str, field: str, columns: Columns) -> InputError:
    return InputError(f"{row} has no {field} (in a column {' or '.join(columns[field].names)}); every row needs one.")


def _check_answers(items: pa.Table, file: UserFile) -> None:
    """Raise InputError for a right answer that is not of its question's type."""
    for place in pc.indices_nonzero(pc.not_equal(items["type"], "text")).to_pylist():
        (item,) = items.slice(place, 1).to_pylist()
        if right_value(item, item["answer"]) is None:
            raise InputError(
                f"{file.row(place)} is of type {item['type']}, but its answer, {item['answer']!r}, is not."
            )


def _replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
