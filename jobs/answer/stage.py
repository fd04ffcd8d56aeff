"""The answer stage as an executor runs it: videos and their questions in, rows of answers out."""

import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import torch

from longvlm.jobs.answer.terms import AnswerTerms, begun_row, failed_answer
from longvlm.jobs.answer.view import VideoView, Viewer
from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.resources import AnswerResources
from longvlm.jobs.cluster.tally import MAX_ATTEMPTS, StageReporter
from longvlm.jobs.stored_videos import StoredVideo, stream_videos
from longvlm.pipeline.answering.evidence import fold
from longvlm.pipeline.answering.typed import as_request, read_value
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Answer, Group
from longvlm.pipeline.models.contract import LanguageModel
from longvlm.pipeline.models.families import load_model
from longvlm.pipeline.models.prefix import prefix_of
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError
from longvlm.schemas.tables import AskedQuestion, GroupRow

ANSWERS_PER_BATCH = 128  # handed to the driver together ...
BATCH_S = 5.0  # ... or after so many seconds, since the driver commits what it has
_KILLER = TerminalError(ErrorCode.LOST, f"{MAX_ATTEMPTS} workers died on this question; ask it alone.")


@dataclass(frozen=True, eq=False)
class _Asked:
    """A question that the engine has, and the video as it is shown for it."""

    group: GroupRow
    question: AskedQuestion
    view: VideoView
    segments: list[dict[str, Any]]


class Answerer:
    """Stage 2: one actor holds one language model and streams videos through its engine.

    Args:
        terms: what it has to know.
        tally: of the run.
        resources: of the stage.
        model: one that is loaded already; None: it loads that of the terms.
    """

    def __init__(
        self, terms: AnswerTerms, tally: Any, resources: AnswerResources, model: LanguageModel | None = None
    ) -> None:
        torch.set_num_threads(resources.threads)
        self.terms, self.recipe = terms, terms.recipe
        self.stage, self.prefill, self.decode = (StageReporter(name, tally) for name in ("answer", "prefill", "decode"))
        self.stage.start_worker()
        device = "cuda" if resources.gpus else "cpu"
        self.model = model or load_model(self.recipe.model, self.recipe.precision, device)
        self.engine = Engine(self.model, self.recipe, resources.kv_bytes)
        follows = self.recipe.focus in ("question", "auto")
        texts = load_text_encoder(terms.search_model) if follows and terms.search_model else None
        self.viewer = Viewer(self.recipe.focus, texts)

    def __call__(self, groups: pa.Table) -> Iterator[pa.Table]:
        """Rows of GROUPS in, rows of tables.ANSWERS out, in any order.

        Questions that were in hand when a worker died are asked one by one, so that one that kills its workers is found
        and fails alone.
        """
        parts: list[list[GroupRow]] = [[]]  # those that nothing is held against go together
        killers = []
        rows: list[GroupRow] = groups.to_pylist()
        attempts = iter(self.stage.attempts(_keys(rows)))
        for group in rows:
            counts = list(islice(attempts, len(group["questions"])))
            if not any(counts):
                parts[0].append(group)
                continue
            for question, count in zip(group["questions"], counts, strict=True):
                if count < MAX_ATTEMPTS:
                    parts.append([{**group, "questions": [question]}])
                else:
                    killers.append(self._failed(group, question, _KILLER))
        if killers:
            yield _table(killers)
        for part in filter(None, parts):
            yield from self._answer(part)

    def _answer(self, groups: list[GroupRow]) -> Iterator[pa.Table]:
        """Some videos through the engine together."""
        self.stage.begin(_keys(groups))
        rows: list[dict[str, Any]] = []
        clock = _Lap(self.engine)
        for row in self._rows(groups):
            rows.append(row)
            if len(rows) >= ANSWERS_PER_BATCH or clock.elapsed_s > BATCH_S:
                self._count(rows, clock)
                yield _table(rows)
                rows, clock = [], _Lap(self.engine)  # the driver may have let us wait
        self._count(rows, clock)
        yield _table(rows)

    def _count(self, rows: list[dict[str, Any]], clock: "_Lap") -> None:
        """Tell the tally what became of the time since the last batch."""
        lap = clock.lap()
        self.stage.finish([_key(row["write_id"], row["question_id"]) for row in rows], lap["busy_s"], lap["cpu_s"])
        self.prefill.add_tokens(int(lap["prefill_tokens"]), lap["prefill_s"])
        self.decode.add_tokens(int(lap["decode_tokens"]), lap["decode_s"])

    def _rows(self, groups: list[GroupRow]) -> Iterator[dict[str, Any]]:
        """A row a question, as they come."""
        failed: deque[dict[str, Any]] = deque()
        asked: dict[Hashable, _Asked] = {}

        def source() -> Iterator[Group]:
            write_ids = [group["write_id"] for group in groups]
            videos = stream_videos(self.terms.snapshot, write_ids, with_embedding=self.viewer.reads_vectors)
            for number, (group, video) in enumerate(zip(groups, videos, strict=True)):
                if isinstance(video, PipelineError):
                    failed.extend(self._failed(group, question, video) for question in group["questions"])
                    continue
                for view, places in self._views(group, video):
                    about = {(number, place): group["questions"][place] for place in places}
                    if isinstance(view, PipelineError):
                        failed.extend(self._failed(group, question, view) for question in about.values())
                        continue
                    asked.update((key, _Asked(group, one, view, video.segments)) for key, one in about.items())
                    requests = [as_request(key, question) for key, question in about.items()]
                    yield Group(prefix_of(view.tokens, video.segments, self.terms.sight), requests)

        for answer in self.engine.answer(source()):
            while failed:
                yield failed.popleft()
            yield self._row(answer, asked.pop(answer.key))
        yield from failed

    def _views(self, group: GroupRow, video: StoredVideo) -> Iterator[tuple[VideoView | PipelineError, list[int]]]:
        """What is shown of a video within the budget, and the places of the questions that see it so."""
        num_beside = max(self.model.num_text_rows(one["start_s"], one["end_s"]) for one in video.segments)
        recipe = self.recipe
        budget = self.terms.sight.budget(recipe.budget, recipe.tokens_per_segment, recipe.focus, num_beside)
        return self.viewer.views(video, budget, [question["question"] for question in group["questions"]])

    def _row(self, answer: Answer, asked: _Asked) -> dict[str, Any]:
        group, question = asked.group, asked.question
        made = {
            "num_visual_tokens": answer.num_visual_tokens,
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "latency_ms": answer.latency_ms,
            "thinking": answer.thinking,
            "focus": asked.view.focus,
            "kept_segments": asked.view.kept,
        }
        if answer.error is not None:
            return self._failed(group, question, answer.error) | made
        value = read_value(question, answer.text or "")
        return {
            **begun_row(group, question, self.recipe, self.terms.run_id),
            **made,
            "status": "unparsed" if value is None and question["type"] != "text" else "answered",
            "answer": answer.text,
            "value": value,
            "confidence": answer.confidence,
            "evidence": fold(answer.attention, asked.view.tokens, self.terms.sight.num_global_tokens, asked.segments),
        }

    def _failed(self, group: GroupRow, question: AskedQuestion, error: PipelineError) -> dict[str, Any]:
        return failed_answer(group, question, self.recipe, self.terms.run_id, error)


class _Lap:
    """Seconds and tokens since the last lap."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last = self._now()

    @property
    def elapsed_s(self) -> float:
        """Wall seconds since the last lap."""
        return time.perf_counter() - self.last["busy_s"]

    def lap(self) -> dict[str, float]:
        """What came since, and begin anew."""
        before, self.last = self.last, self._now()
        return {name: value - before[name] for name, value in self.last.items()}

    def _now(self) -> dict[str, float]:
        stats = self.engine.stats
        return {
            "busy_s": time.perf_counter(),
            "cpu_s": time.process_time(),
            "prefill_tokens": stats.prefill_tokens,
            "prefill_s": stats.prefill_s,
            "decode_tokens": stats.decode_tokens,
            "decode_s": stats.decode_s,
        }


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows on their way to the driver, counted, and with a line in the log for each that failed."""
    for row in rows:
        metrics.QUESTIONS.record(1, status=row["status"])
    logs.failures(rows)
    return pa.Table.from_pylist(rows, schema=tables.ANSWERS)


def _keys(groups: list[GroupRow]) -> list[str]:
    return [_key(group["write_id"], question["question_id"]) for group in groups for question in group["questions"]]


def _key(write_id: str, question_id: str) -> str:
    return f"{write_id}/{question_id}"
