"""Answers and verdicts of a benchmark's items: read from the store, judged, and added to it."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from longvlm.jobs.answer.plan import HASH
from longvlm.jobs.cluster.commits import Commits
from longvlm.jobs.cluster.resources import COMMIT_VERDICTS, COMMIT_VERDICTS_EVERY_S
from longvlm.jobs.names import known_names, match_live
from longvlm.pipeline.judging.benchmarks import Benchmark
from longvlm.pipeline.judging.judges import Case, Judge, Verdict, judge_all
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import clock, tables
from longvlm.schemas.errors import ErrorCode

NOT_IN_STORE = "not_in_store"
_PREDICTED = ("answered", "unparsed")  # answers that say something: one that is not of its type is wrong, not missing
_LIVE = """
CREATE TEMP TABLE live AS
SELECT row_number() OVER (ORDER BY write_id)::INTEGER AS n, video_id, uri, external_id, write_id
FROM live_videos WHERE recipe = $1
"""
_PREDICTIONS = """
WITH newest AS (
    FROM ledger_answers SEMI JOIN live USING (write_id) WHERE answer_recipe = $1
    QUALIFY row_number() OVER (
        PARTITION BY write_id, question_id, question_hash ORDER BY seq DESC NULLS LAST, created_at DESC, run_id DESC
    ) = 1
),
wanted AS (
    SELECT q, n, hash_of("type", choices, "schema", question) AS hash,
        coalesce(question_id, id_of("type", choices, "schema", question)) AS question_id
    FROM given LEFT JOIN named ON video = name
)
SELECT w.question_id, l.video_id, l.uri, l.write_id, a.model, a.answer, a.confidence,
    CASE WHEN l.write_id IS NULL THEN 'not_indexed' WHEN a.status IS NULL THEN 'not_answered'
        WHEN a.status = 'failed' THEN 'answer_failed' ELSE a.status END AS status
FROM wanted w LEFT JOIN live l USING (n)
LEFT JOIN newest a ON a.write_id = l.write_id AND a.question_id = w.question_id AND a.question_hash = w.hash
ORDER BY w.q
"""
_KNOWN = """
SELECT v.* FROM ledger_verdicts v SEMI JOIN wanted_prompts USING (prompt_hash)
WHERE judge = $1 AND status <> 'failed'
"""
_KEY = ("benchmark", "dimension", "question_id", "question", "reference", "write_id", "answer_recipe", "prompt_hash")


@dataclass(frozen=True)
class AnsweredItem:
    """A benchmark item with its answers."""

    item: dict[str, Any]  # a row of benchmarks.ITEMS
    status: str  # answered, or why there is no prediction
    predictions: tuple[str, ...] = ()
    given: dict[str, Any] | None = None  # question_id, video_id, uri, write_id, model and confidence of the answer


def match_videos(store: Store, benchmark: Benchmark, items: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Match items with the store's videos: the items with names that it knows, and the number of others.

    A name that it does not know is tried with the benchmark's prefix before it: `v_` and an id, `video` and a number.
    An item without a video is left with `video` None.
    """
    names = {item["video"] for item in items}
    prefixed = {benchmark.video_prefix + name: name for name in names}
    with catalog.connect(store.pin(("videos",)), ()) as con:
        known = known_names(con, [*names, *prefixed], "ledger_videos")
    by_name = {name: longer for longer, name in prefixed.items() if longer in known} | {n: n for n in names & known}
    named = [item | {"video": by_name.get(item["video"])} for item in items]
    return named, sum(item["video"] is None for item in named)


def questions_of(benchmark: Benchmark, items: list[dict[str, Any]]) -> pa.Table:
    """The questions to ask, as tables.QUESTIONS: each item's question, and for paired ones then each item's second."""
    asked = [item for item in items if item["video"] is not None]
    rows = list(asked)
    if benchmark.is_paired:
        for item in asked:
            question_id = item["question_id"] and f"{item['question_id']}#2"
            rows.append(item | {"question_id": question_id, "question": item["question2"]})
    return pa.Table.from_pylist(rows, schema=tables.QUESTIONS)


def read_answered(
    store: Store, benchmark: Benchmark, items: list[dict[str, Any]], index_recipe: str, answer_recipe: str
) -> list[AnsweredItem]:
    """Read the answers to the items from the store, in their order.

    Raises:
        InputError: a name could mean several videos.
    """
    questions = questions_of(benchmark, items)
    with catalog.connect(store.pin(("videos", "answers")), ("live_videos",)) as con:
        con.execute(HASH)
        con.execute(_LIVE, [index_recipe])
        con.register("given", questions.append_column("q", pa.array(range(len(questions)), pa.int32())))
        con.register("named", match_live(con, "given", "live", "ledger_videos")[0])
        found = con.sql(_PREDICTIONS, params=[answer_recipe]).to_arrow_table().to_pylist()
    num_asked = len(found) // (2 if benchmark.is_paired else 1)
    pairs = iter(
        zip(*(found[start : start + num_asked] for start in range(0, len(found), num_asked or 1)), strict=True)
    )
    answered = []
    for item in items:
        if item["video"] is None:
            answered.append(AnsweredItem(item, NOT_IN_STORE))
            continue
        given = next(pairs)
        missing = [row["status"] for row in given if row["status"] not in _PREDICTED]
        texts = tuple(row["answer"] or "" for row in given)
        answered.append(
            AnsweredItem(item, missing[0], given=given[0])
            if missing
            else AnsweredItem(item, "answered", texts, given[0])
        )
    return answered


class Verdicts:
    """The verdicts of one evaluation: those that the store knows already, and new ones."""

    def __init__(self, store: Store, benchmark: Benchmark, judge: Judge, run_id: str, answer_recipe: str) -> None:
        self.store, self.benchmark, self.judge = store, benchmark, judge
        self.run_id, self.answer_recipe = run_id, answer_recipe
        self.num_reused = 0  # verdicts by what the judge had said before
        self.num_new = 0  # verdicts that it was asked for now
        self._commits: Commits[dict[str, Any]] = Commits(
            store.uri,
            "evaluate",
            run_id,
            lambda rows: store.append("verdicts", pa.Table.from_pylist(rows, schema=tables.VERDICTS)),
            every_s=COMMIT_VERDICTS_EVERY_S,
            most_rows=COMMIT_VERDICTS,
        )

    def judge_answers(
        self, answered: list[AnsweredItem], *, may_ask: bool = True
    ) -> Generator[tuple[int, dict[str, Any]]]:
        """Judge answers: rows of tables.VERDICTS with the place of what they are about; equal prompts are judged once.

        Rows are committed as they come, and the rest when the caller stops.

        Args:
            answered: in the order of the benchmark; those without predictions are passed over.
            may_ask: the judge is asked for what is not known.

        Raises:
            InputError: the judge cannot judge at all; what came before is kept.
        """
        cases: dict[str, Case] = {}
        places: dict[str, list[int]] = {}
        for place, one in enumerate(answered):
            if one.status == "answered":
                case = Case(self.benchmark.dimension, one.item, one.predictions)
                prompt_hash = hashlib.sha256(self.judge.prompt(case).encode("utf-8", "replace")).hexdigest()
                cases.setdefault(prompt_hash, case)
                places.setdefault(prompt_hash, []).append(place)
        known, there = self._known(list(cases))
        try:
            for prompt_hash, row in known.items():
                for place in places[prompt_hash]:
                    self.num_reused += 1
                    yield place, self._add_row(answered[place], prompt_hash, row, there)
            asked = ((prompt_hash, case) for prompt_hash, case in cases.items() if prompt_hash not in known)
            for prompt_hash, verdict in judge_all(self.judge, asked if may_ask else ()):
                for place in places[prompt_hash]:
                    self.num_new += 1
                    yield place, self._add_row(answered[place], prompt_hash, _as_row(verdict), there)
        finally:
            self._commits.flush()

    def _known(
        self, prompt_hashes: list[str]
    ) -> tuple[dict[str, dict[str, Any]], dict[tuple[Any, ...], dict[str, Any]]]:
        """By prompt what the judge has said of it before; and by key the rows that say so."""
        with catalog.connect(self.store.pin(("verdicts",)), ()) as con:
            con.register("wanted_prompts", pa.table({"prompt_hash": pa.array(prompt_hashes, pa.string())}))
            rows = con.sql(_KNOWN, params=[self.judge.name]).to_arrow_table().to_pylist()
        return {row["prompt_hash"]: row for row in rows}, {tuple(row[name] for name in _KEY): row for row in rows}

    def _add_row(
        self,
        answered: AnsweredItem,
        prompt_hash: str,
        said: dict[str, Any],
        there: dict[tuple[Any, ...], dict[str, Any]],
    ) -> dict[str, Any]:
        """The row of a verdict, added to the table unless it is there."""
        item, given = answered.item, answered.given or {}
        row = {
            **dict.fromkeys(tables.VERDICTS.names),
            "run_id": self.run_id,
            "benchmark": self.benchmark.name,
            "dimension": self.benchmark.dimension,
            **{name: item[name] for name in ("question", "kind")},
            **{name: given[name] for name in ("question_id", "video_id", "uri", "write_id", "model")},
            "answer_recipe": self.answer_recipe,
            **dict(zip(("prediction", "prediction2"), answered.predictions, strict=False)),
            "reference": item["answer"],
            "judge": self.judge.name,
            "prompt_hash": prompt_hash,
            **{name: said[name] for name in _SAID},
            "created_at": clock.utc_now(),
        }
        key = tuple(row[name] for name in _KEY)
        if key not in there:
            there[key] = row
            self._commits.add(row, 1)
        return there[key]


_SAID = ("raw_reply", "score", "is_right", "status", "error_code", "error")


def _as_row(verdict: Verdict) -> dict[str, Any]:
    said = {name: getattr(verdict, name) for name in _SAID}
    return said | {"error_code": verdict.error_code and verdict.error_code.value}


def is_judge_unreachable(row: dict[str, Any]) -> bool:
    """Whether a verdict failed because the judge could not be reached."""
    return bool(row["error_code"] == ErrorCode.NETWORK.value)
