"""Answers from shared prefixes: a video is read once, and all questions about it branch off from there.

Rows of many videos decode together. When half of them are done, the others move together and waiting ones take the
free places: before that, moving costs more than it saves (a move copies the keys and values, about as much as a step).

Shape letters: N prefix rows, M rows after projection, P prefix positions, R rows, W watched tokens, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, islice

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longvlm.pipeline.engine.batch import Batch, Branch
from longvlm.pipeline.engine.growing import Growing
from longvlm.pipeline.engine.kv_budget import kv_budget
from longvlm.pipeline.engine.logits import choose, likelihoods
from longvlm.pipeline.engine.requests import Answer, Group, Stats
from longvlm.pipeline.engine.sequences import Row, Video, lay_out_row, read_group
from longvlm.pipeline.models.contract import LanguageModel
from longvlm.pipeline.models.markers import onto_segments
from longvlm.pipeline.transfer import Fetch, tensor_on, to_device
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import AnswerRecipe

# More rows than this gain little: their arithmetic, not reading the weights, then sets the pace of a step.
MAX_ROWS = {"cpu": 64, "cuda": 256}


class Engine:
    """Answers groups with a model on one device. The model is the engine's from then on.

    In float32 a row's greedy tokens are those it would get alone, whatever else is in the batch; so are sampled ones,
    whose random numbers come from the recipe's seed and the question.
    """

    def __init__(self, model: LanguageModel, recipe: AnswerRecipe, kv_bytes: int | None = None) -> None:
        self.model, self.recipe = model, recipe
        self.kv_bytes = kv_budget(model.device, kv_bytes)
        self.max_rows = MAX_ROWS[model.device.type]
        self.stats = Stats()
        self._batch = Batch(model.llm, model.device)
        self._banned_ids, self._eos_ids = (tensor_on(model.device, ids) for ids in (model.banned_ids, model.eos_ids))
        self._queue: deque[Video] = deque()  # videos with rows that wait
        self._underway: list[Row] = []
        self._done: list[Answer] = []

    @torch.inference_mode()
    def answer(self, groups: Iterable[Group]) -> Iterator[Answer]:
        """Answer every request once, in any order; groups are taken as there is room for them.

        A request that cannot be answered carries its error and leaves the others alone.

        Raises:
            InputError: the tokens come from another tower than the model's, or the model lacks the template.
        """
        source = iter(groups)
        busy = True
        while busy:
            try:
                busy = self._round(source)
            except torch.OutOfMemoryError:
                self._shrink()
            self.stats.num_answers += len(self._done)
            yield from self._done
            self._done.clear()

    def _round(self, source: Iterator[Group]) -> bool:
        """Fill free places, then decode until half of the rows are done; False when there is nothing left to do."""
        rows = self._admit(source)
        if rows:
            self._prefill(rows)
        if self._batch.growing is not None:
            self._decode(self._batch.growing)
            self._collect(self._batch.growing)
        return bool(rows or self._batch.branches or self._done)

    def _admit(self, source: Iterator[Group]) -> list[Row]:
        """Drop what is done and take rows off the queue, as many as there are places and memory for."""
        self._batch.keep_open([video.prefix for video in self._queue])
        rows: list[Row] = []
        while len(self._underway) < self.max_rows and (video := self._next_video(source)):
            row, fits = video.pending[0], self._fits(video.pending[0])
            if self._underway and not fits:
                break
            if not fits:  # prefixes kept for rows that still wait give way to the first of them
                self._batch.clear()
                fits = self._fits(row)
            row.start(self.recipe)
            self._underway.append(video.pending.popleft())
            if fits:
                rows.append(row)
            else:
                self._fail(row, self._out_of_memory(row))
        return rows

    def _next_video(self, source: Iterator[Group]) -> Video | None:
        """The first video with rows that wait, taken from the source if need be; None at its end."""
        while not (self._queue and self._queue[0].pending):
            if self._queue:
                self._queue.popleft()
            elif (group := next(source, None)) is None:
                return None
            else:
                video, refused = read_group(self.model, self.recipe, group)
                self._done += refused
                self._queue += [video] if video else []
        return self._queue[0]

    def _fits(self, row: Row) -> bool:
        """Whether keys and values stay within their budget if this row comes in and all use their room."""
        rows = [*self._underway, row]
        prefixes = {id(prefix): len(prefix) for prefix in [*self._batch.prefixes, *(row.prefix for row in rows)]}
        positions = len(prefixes) * max(prefixes.values()) + len(rows) * max(row.num_positions for row in rows)
        return positions * self._batch.bytes_per_token <= self.kv_bytes

    def _prefill(self, rows: list[Row]) -> None:
        """Read what is new: prefixes, then questions. Rows with options end here, others get their first token."""
        started_s, batch = time.perf_counter(), self._batch
        here = {id(prefix) for prefix in batch.prefixes}
        prefixes = {id(row.prefix): row.prefix for row in rows if id(row.prefix) not in here}
        batch.add_prefixes(list(prefixes.values()))
        asked = [(row, stem) for row in rows for stem in row.stems]
        branches = [Branch(row.prefix, row.suffix + stem, 1 + len(stem)) if row.options else row for row, stem in asked]
        members = iter(asked)
        for some, hidden_WD, seen_WP, tails in batch.begin(branches):
            logits_WV = batch.logits(hidden_WD)
            starts = accumulate((branch.num_watched for branch in some), initial=0)
            placed = list(zip(range(len(some)), starts, islice(members, len(some)), strict=False))
            free = [(i, start, row) for i, start, (row, _) in placed if not row.options]
            if free:
                places, at, free_rows = zip(*free, strict=True)
                at_R = tensor_on(batch.device, at)
                growing = self._growing(free_rows)
                self._extend(growing, logits_WV[at_R])
                batch.add(free_rows, places, tails, seen_WP[at_R], growing)
            self._judge(logits_WV, seen_WP, [(start, *member) for _, start, member in placed if member[0].options])
        self.stats.prefill_tokens += sum(map(len, prefixes.values())) + sum(len(branch.suffix) for branch in branches)
        self.stats.prefill_s += time.perf_counter() - started_s

    def _growing(self, rows: Sequence[Row]) -> Growing:
        """The answers of rows that have none yet."""
        drawn = None
        if self.recipe.temperature:
            drawn = to_device(pad_sequence([row.drawn for row in rows], batch_first=True), self.model.device)
        return Growing([len(row.suffix) for row in rows], [row.room for row in rows], drawn, self._eos_ids)

    def _extend(self, growing: Growing, logits_RV: Tensor) -> None:
        """Choose each row's next token."""
        if len(self._banned_ids):
            logits_RV.index_fill_(1, self._banned_ids, float("-inf"))
        growing.extend(choose(logits_RV, growing.drawn, self.recipe))

    def _decode(self, growing: Growing) -> None:
        """One more token for every open row, and again until half of the rows are done."""
        started_s, num_rows = time.perf_counter(), len(self._batch.branches)
        while 2 * (num_open := growing.count_open()) > num_rows:
            self._extend(growing, self._batch.decode())
            self.stats.num_steps += 1
            self.stats.decode_tokens += num_open
        self.stats.decode_s += time.perf_counter() - started_s

    def _collect(self, growing: Growing) -> None:
        """Take the rows' new tokens to the host, and finish the rows that are done."""
        rows: list[Row] = self._batch.branches  # type: ignore[assignment] # all of them are
        new, is_open, overflowed = growing.fetch()
        ended = [i for i, row in enumerate(rows) if row.is_open and not is_open[i]]
        (seen_EP,) = Fetch(self._batch.seen_RP[tensor_on(self._batch.device, ended)]).wait()
        for row, ids in zip(rows, new, strict=True):
            row.new = ids
        for i, seen_P in zip(ended, seen_EP, strict=True):
            if overflowed[i]:
                self._fail(rows[i], self._overflow())
            else:
                self._close(rows[i], seen_P / len(rows[i].new))

    def _judge(self, logits_WV: Tensor, seen_WP: Tensor, asked: list[tuple[int, Row, tuple[int, ...]]]) -> None:
        """Likelihoods of the options that begin with each row's stem; a row whose options all have one is done."""
        if not asked:
            return
        wanted = [
            (start, row, stem, i) for start, row, stem in asked for i, ids in enumerate(row.options) if ids[:-1] == stem
        ]
        lengths = [1 + len(stem) for _, _, stem in asked]
        tokens = [start + i for (start, *_), length in zip(asked, lengths, strict=True) for i in range(length)]
        found, seen = Fetch(
            likelihoods(logits_WV, [(start, row.options[i]) for start, row, _, i in wanted]),
            seen_WP[tensor_on(seen_WP.device, tokens)],
        ).wait()
        for (_, row, _, i), likelihood in zip(wanted, found.tolist(), strict=True):
            row.judged[i] = likelihood
        for (_, row, stem), part in zip(asked, torch.split(seen, lengths), strict=True):
            row.seen[stem] = part
        for row in dict.fromkeys(row for _, row, _ in asked):
            if len(row.judged) == len(row.options):
                self._decide(row)

    def _decide(self, row: Row) -> None:
        """Answer with the likeliest option."""
        shares = torch.tensor([row.judged[i] for i in range(len(row.options))], dtype=torch.float64).softmax(dim=0)
        best = int(shares.argmax())
        if shares.isnan().any():
            self._fail(row, self._overflow())
        else:
            seen_P = row.seen[row.options[best][:-1]].mean(dim=0)
            self._finish(row, row.request.options[best], seen_P, float(shares[best]))

    def _close(self, row: Row, seen_P: Tensor) -> None:
        """A row has come to its end: take its text, or ask once more."""
        text, retry = self.model.decode(row.new), row.request.retry
        if retry and row.question == row.request.question and not retry.accepts(text):
            try:
                again = lay_out_row(self.model, self.recipe, row.video, row.request, retry.question)
            except TerminalError:
                pass  # the longer question does not fit the context, so the first answer is the only one
            else:
                row.is_open = False
                self._underway.remove(row)
                self._put_back(again)
                return
        self._finish(row, text, seen_P)

    def _finish(self, row: Row, text: str, seen_P: Tensor, confidence: float | None = None) -> None:
        shown, prefix = row.video.group.prefix, row.prefix
        seen_M = seen_P[prefix.first_visual : len(prefix)]
        lengths = [len(self.model.marker_ids(start_s)) for start_s in shown.times.starts_s] if shown.times else []
        if shown.times and any(lengths):
            attention = onto_segments(seen_M, shown.times, lengths)
        else:
            attention = _onto_prefix(seen_M, len(shown.rows), shown.num_whole_frames)
        self._done.append(replace(self._counted(row), text=text, confidence=confidence, attention=attention))
        row.is_open = False
        self._underway.remove(row)

    def _fail(self, row: Row, error: TerminalError) -> None:
        self._done.append(replace(self._counted(row), error=error))
        row.is_open = False
        self._underway.remove(row)

    def _counted(self, row: Row) -> Answer:
        return Answer(
            row.request.key,
            num_visual_tokens=len(row.prefix) - row.prefix.first_visual,
            num_prompt_tokens=len(row.prefix) + len(row.suffix),
            num_new_tokens=len(row.new),
            latency_ms=(time.perf_counter() - row.started_s) * 1e3,
        )

    def _shrink(self) -> None:
        """The device ran out of memory: put everything back into the queue and go on with half as much."""
        rows, self._underway = self._underway, []
        self._batch.clear()
        if self._batch.device.type == "cuda":
            torch.cuda.empty_cache()
        self.max_rows, self.kv_bytes = max(1, self.max_rows // 2), self.kv_bytes // 2
        if len(rows) == 1:
            self._underway = rows
            self._fail(rows[0], self._out_of_memory(rows[0]))
            return
        for row in reversed(rows):
            self._put_back(row)

    def _put_back(self, row: Row) -> None:
        """Let a row be the next one to get a place."""
        row.video.pending.appendleft(row)
        if row.video in self._queue:
            self._queue.remove(row.video)
        self._queue.appendleft(row.video)

    def _overflow(self) -> TerminalError:
        return TerminalError(
            ErrorCode.ANSWER_FAILED,
            f"the model's output overflowed in {self.recipe.precision}; answer in bfloat16 or float32.",
        )

    def _out_of_memory(self, row: Row) -> TerminalError:
        needed = (len(row.prefix) + row.num_positions) * self._batch.bytes_per_token
        return TerminalError(
            ErrorCode.MEMORY_LIMIT,
            f"the prompt's keys and values take {needed / 1e6:.0f} MB, more than there is room for beside the model; "
            "answer with a smaller --budget or on a larger device.",
        )


def _onto_prefix(seen_M: Tensor, num_rows: int, num_whole_frames: int | None) -> Tensor:
    """Attention to projected rows as attention to the prefix rows they come from, [N].

    A family that pools a frame's patches has fewer rows than patches: each frame's share is spread over its patches. A
    row that closes the video comes from none.
    """
    if num_whole_frames is None:
        return seen_M[:num_rows]
    per_frame = len(seen_M) // num_whole_frames
    by_frame = seen_M[: per_frame * num_whole_frames].view(num_whole_frames, per_frame).sum(dim=1)
    num_patches = num_rows // num_whole_frames
    return (by_frame / num_patches).repeat_interleave(num_patches)
