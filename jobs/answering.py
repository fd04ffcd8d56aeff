"""The answer stage as Ray Data runs it: videos and their questions in, rows of answers out."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from jobs.resources import AnswerResources
from jobs.tally import MAX_ATTEMPTS, Stage
from pipeline.language.engine import Answer, Request, answer_batch
from pipeline.language.longvlm import load_longvlm
from pipeline.store.shards import read_tokens
from pipeline.store.snapshot import Snapshot
from pipeline.vision.tokens import from_arrow
from schemas import tables
from schemas.errors import ErrorCode, PipelineError, TerminalError
from schemas.recipe import AnswerRecipe

_QUESTION = pa.struct([(name, pa.string()) for name in ("question_id", "question", "question_hash", "type")])
GROUPS = pa.schema(  # one row a video: what is asked about it
    [
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("write_id", pa.string()),
        ("questions", pa.list_(_QUESTION)),
    ]
)


class Answerer:
    """Stage 2: one actor holds one language model."""

    def __init__(
        self, recipe: dict[str, Any], snapshot: Snapshot, run_id: str, tally: Any, resources: AnswerResources
    ) -> None:
        import torch

        torch.set_num_threads(resources.threads)
        self.recipe = AnswerRecipe(**recipe)
        self.snapshot = snapshot
        self.run_id = run_id
        self.stage = Stage("answer", tally)
        self.requests_per_batch = resources.requests_per_batch
        self.model = load_longvlm(self.recipe.model, self.recipe.precision, "cuda" if resources.gpus else "cpu")

    def __call__(self, groups: pa.Table) -> Iterator[pa.Table]:
        """Rows of GROUPS in, rows of tables.ANSWERS out, a video at a time."""
        for group in groups.to_pylist():
            keys = [f"{group['write_id']}/{question['question_id']}" for question in group["questions"]]
            if max(self.stage.attempts(keys)) >= MAX_ATTEMPTS:
                killer = TerminalError(ErrorCode.LOST, f"{MAX_ATTEMPTS} workers died on this question; ask it alone.")
                rows = [failed_answer(group, q, self.recipe, self.run_id, killer) for q in group["questions"]]
            else:
                with self.stage.work(keys) as clock:
                    rows = clock.time(self._answer, group)
            yield pa.Table.from_pylist(rows, schema=tables.ANSWERS)

    def _answer(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        """All questions of one video; tokens that cannot be read fail its questions, not the run."""
        questions = group["questions"]
        try:
            prefix = from_arrow(read_tokens(self.snapshot, [group["write_id"]])).prefix()
        except PipelineError as error:
            return [failed_answer(group, question, self.recipe, self.run_id, error) for question in questions]
        rows = []
        for start in range(0, len(questions), self.requests_per_batch):
            batch = questions[start : start + self.requests_per_batch]
            requests = [Request(prefix, question["question"]) for question in batch]
            for question, answer in zip(batch, answer_batch(self.model, requests, self.recipe), strict=True):
                rows.append(self._row(group, question, answer))
        return rows

    def _row(self, group: dict[str, Any], question: dict[str, Any], answer: Answer) -> dict[str, Any]:
        if answer.error is not None:
            return failed_answer(group, question, self.recipe, self.run_id, answer.error)
        return _row(group, question, self.recipe, self.run_id) | {
            "status": "answered",
            "answer": answer.text,
            "num_visual_tokens": answer.num_visual_tokens,
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "latency_ms": answer.latency_ms,
        }


def failed_answer(
    group: dict[str, Any], question: dict[str, Any], recipe: AnswerRecipe, run_id: str, error: PipelineError
) -> dict[str, Any]:
    """The row of a question that has no answer, and why."""
    row = _row(group, question, recipe, run_id)
    return row | {"status": "failed", "error_code": error.code, "error": error.message}


def _row(group: dict[str, Any], question: dict[str, Any], recipe: AnswerRecipe, run_id: str) -> dict[str, Any]:
    return {
        **question,
        "video_id": group["video_id"],
        "uri": group["uri"],
        "write_id": group["write_id"],
        "run_id": run_id,
        "model": recipe.model,
        "answer_recipe": recipe.fingerprint,
        "created_at": datetime.now(UTC).replace(tzinfo=None),
    }
