"""The answer stage as Ray Data runs it: videos and their questions in, rows of answers out."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pyarrow as pa
import torch

from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.resources import AnswerResources
from longvlm.jobs.cluster.tally import MAX_ATTEMPTS, Stage
from longvlm.pipeline.answering.evidence import fold
from longvlm.pipeline.answering.typed import as_request, read_value
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Answer, Backend, Group
from longvlm.pipeline.models.families import load_model
from longvlm.pipeline.models.prefix import Sight, prefix_of
from longvlm.pipeline.store.shards import by_video, read_segments, read_tokens
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.vision.budget import Budget, fit, follows_question
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.pipeline.vision.tokens import VideoTokens, from_arrow
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError, TransientError
from longvlm.schemas.recipe import AnswerRecipe

VIDEOS_PER_READ = 8  # one read serves several: their shards' footers are looked at once
READS_AHEAD = 2  # so that the model does not wait for an object store
ANSWERS_PER_BATCH = 128  # handed to the driver together ...
BATCH_S = 5.0  # ... or after so many seconds, since the driver commits what it has
_KILLER = TerminalError(ErrorCode.LOST, f"{MAX_ATTEMPTS} workers died on this question; ask it alone.")


@dataclass(frozen=True)
class Terms:
    """What an answerer has to know besides its questions."""

    recipe: AnswerRecipe
    sight: Sight  # of its model
    snapshot: Snapshot
    run_id: str
    search_model: str  # whose text encoder is beside the stored search embeddings


@dataclass(frozen=True, eq=False)
class _Seen:
    """A video's tokens as a question sees them, and when they were."""

    tokens: VideoTokens
    segments: list[dict[str, Any]]  # rows of the table `segments`, without embeddings
    embeddings: pa.ChunkedArray | None  # of the segments, where the focus follows the question


class Answerer:
    """Stage 2: one actor holds one language model and streams videos through its engine."""

    def __init__(self, terms: Terms, tally: Any, resources: AnswerResources) -> None:
        torch.set_num_threads(resources.threads)
        self.terms, self.recipe = terms, terms.recipe
        self.stage, self.prefill, self.decode = (Stage(name, tally) for name in ("answer", "prefill", "decode"))
        self.stage.start_logs()
        self.model = load_model(self.recipe.model, self.recipe.precision, "cuda" if resources.gpus else "cpu")
        self.engine: Backend = Engine(self.model, self.recipe, resources.kv_bytes)
        self.texts = load_text_encoder(terms.search_model) if self.recipe.focus == "question" else None

    def __call__(self, groups: pa.Table) -> Iterator[pa.Table]:
        """Rows of GROUPS in, rows of tables.ANSWERS out, in any order.

        Questions that were in hand when a worker died are asked one by one, so that one that kills its workers is found
        and fails alone.
        """
        parts: list[list[dict[str, Any]]] = [[]]  # those that nothing is held against go together
        killers = []
        rows = groups.to_pylist()
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

    def _answer(self, groups: list[dict[str, Any]]) -> Iterator[pa.Table]:
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

    def _rows(self, groups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A row a question, as they come."""
        failed: deque[dict[str, Any]] = deque()
        asked: dict[tuple[int, int], tuple[dict[str, Any], dict[str, Any], _Seen]] = {}

        def source() -> Iterator[Group]:
            for number, (group, seen) in enumerate(self._read_ahead(groups)):
                if isinstance(seen, PipelineError):
                    failed.extend(self._failed(group, question, seen) for question in group["questions"])
                    continue
                for part, places in self._fitted(group, seen, failed):
                    keys = [(number, place) for place in places]
                    questions = [group["questions"][place] for place in places]
                    asked.update((key, (group, q, part)) for key, q in zip(keys, questions, strict=True))
                    requests = [as_request(key, question) for key, question in zip(keys, questions, strict=True)]
                    yield Group(prefix_of(part.tokens, part.segments, self.terms.sight), requests)

        for answer in self.engine.answer(source()):
            while failed:
                yield failed.popleft()
            yield self._row(answer, *asked.pop(answer.key))  # type: ignore[call-overload] # keys are as made above
        yield from failed

    def _fitted(
        self, group: dict[str, Any], seen: _Seen, failed: deque[dict[str, Any]]
    ) -> Iterator[tuple[_Seen, list[int]]]:
        """The video within the budget, and the places of the questions that see it so: all, or each its own."""
        questions, recipe = group["questions"], self.recipe
        budget = Budget(
            recipe.budget,
            recipe.tokens_per_segment,
            recipe.focus,
            num_global=self.terms.sight.num_global_tokens,
            num_beside=max(len(self.model.marker_ids(segment["start_s"])) for segment in seen.segments),
        )
        own = self.texts is not None and follows_question(seen.tokens, budget)
        for places in [[i] for i in range(len(questions))] if own else [list(range(len(questions)))]:
            try:
                nearness = self._nearness(questions[places[0]], seen) if own else None
                tokens = fit(seen.tokens, budget, nearness)
            except TerminalError as error:
                failed.extend(self._failed(group, questions[place], error) for place in places)
            else:
                yield replace(seen, tokens=tokens), places

    def _nearness(self, question: dict[str, Any], seen: _Seen) -> torch.Tensor:
        """Cosine of a question's text to each segment's search embedding, [S].

        Raises:
            TerminalError: (bad_tokens) a segment has no embedding.
        """
        if self.texts is None or seen.embeddings is None or seen.embeddings.null_count:
            raise TerminalError(ErrorCode.BAD_TOKENS, "a segment has no search embedding; ask with --focus even.")
        vectors = torch.tensor(seen.embeddings.combine_chunks().flatten().to_numpy())
        return vectors.view(len(seen.segments), -1) @ self.texts.encode([question["question"]])[0]

    def _read_ahead(self, groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], "_Seen | PipelineError"]]:
        """Each group with its video's tokens, or why there are none; the next ones are read meanwhile."""
        starts = iter(range(0, len(groups), VIDEOS_PER_READ))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
            ahead: deque[tuple[int, Future[list[_Seen | PipelineError]]]] = deque()
            while True:
                while len(ahead) < READS_AHEAD and (start := next(starts, None)) is not None:
                    write_ids = [group["write_id"] for group in groups[start : start + VIDEOS_PER_READ]]
                    ahead.append((start, pool.submit(self._read, write_ids)))
                if not ahead:
                    return
                start, read = ahead.popleft()
                yield from zip(groups[start : start + VIDEOS_PER_READ], read.result(), strict=True)

    def _read(self, write_ids: list[str]) -> list["_Seen | PipelineError"]:
        """Some videos' tokens, or why one has none; a broken shard fails only the videos that it holds."""
        snapshot = self.terms.snapshot
        try:
            tokens = by_video(read_tokens(snapshot, write_ids))
            segments = by_video(read_segments(snapshot, write_ids, with_embedding=self.texts is not None))
        except (PipelineError, OSError) as error:
            if len(set(write_ids)) > 1:
                return [seen for write_id in write_ids for seen in self._read([write_id])]
            if isinstance(error, PipelineError):
                return [error] * len(write_ids)
            return [TransientError(ErrorCode.NETWORK, f"the stored tokens cannot be read ({error}); ask again.")]
        return [_seen(tokens.get(write_id), segments.get(write_id)) for write_id in write_ids]

    def _row(self, answer: Answer, group: dict[str, Any], question: dict[str, Any], seen: _Seen) -> dict[str, Any]:
        counts = {
            "num_visual_tokens": answer.num_visual_tokens,
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "latency_ms": answer.latency_ms,
        }
        if answer.error is not None:
            return self._failed(group, question, answer.error) | counts
        value = read_value(question, answer.text or "")
        return {
            **_row(group, question, self.recipe, self.terms.run_id),
            **counts,
            "status": "unparsed" if value is None and question["type"] != "text" else "answered",
            "answer": answer.text,
            "value": value,
            "confidence": answer.confidence,
            "evidence": fold(answer.attention, seen.tokens, self.terms.sight.num_global_tokens, seen.segments),
        }

    def _failed(self, group: dict[str, Any], question: dict[str, Any], error: PipelineError) -> dict[str, Any]:
        return failed_answer(group, question, self.recipe, self.terms.run_id, error)


class _Lap:
    """Seconds and tokens since the last lap."""

    def __init__(self, engine: Backend) -> None:
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


def failed_answer(
    group: dict[str, Any], question: dict[str, Any], recipe: AnswerRecipe, run_id: str, error: PipelineError
) -> dict[str, Any]:
    """The row of a question that has no answer, and why."""
    row = _row(group, question, recipe, run_id)
    return row | {"status": "failed", "error_code": error.code, "error": error.message}


def _row(group: dict[str, Any], question: dict[str, Any], recipe: AnswerRecipe, run_id: str) -> dict[str, Any]:
    return {
        **{name: question[name] for name in ("question_id", "question", "question_hash", "type")},
        "video_id": group["video_id"],
        "uri": group["uri"],
        "write_id": group["write_id"],
        "run_id": run_id,
        "model": recipe.model,
        "answer_recipe": recipe.fingerprint,
        "created_at": datetime.now(UTC).replace(tzinfo=None),
    }


def _seen(tokens: pa.Table | None, segments: pa.Table | None) -> "_Seen | PipelineError":
    """One video out of its rows."""
    try:
        video = from_arrow(tables.TOKENS.empty_table() if tokens is None else tokens)
    except TerminalError as error:
        return error
    if segments is None or len(segments) != len(video.counts):
        return TerminalError(ErrorCode.BAD_TOKENS, "the video's segments and tokens differ; index the video again.")
    embeddings = segments["embedding"] if "embedding" in segments.column_names else None
    times = segments.select(["start_s", "end_s", "first_frame", "last_frame"])
    return _Seen(video, times.to_pylist(), embeddings)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows on their way to the driver, counted, and with a line in the log for each that failed."""
    for row in rows:
        metrics.QUESTIONS.record(1, status=row["status"])
    logs.failures(rows)
    return pa.Table.from_pylist(rows, schema=tables.ANSWERS)


def _keys(groups: list[dict[str, Any]]) -> list[str]:
    return [_key(group["write_id"], question["question_id"]) for group in groups for question in group["questions"]]


def _key(write_id: str, question_id: str) -> str:
    return f"{write_id}/{question_id}"
