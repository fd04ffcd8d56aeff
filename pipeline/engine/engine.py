"""Answers from shared prefixes: a video is read once, and all questions about it go on from there.

Rows of many videos decode together. When half of them are done, the others move together and waiting ones take the
free places: before that, moving costs more than it saves (a move copies the keys and values, about as much as a step).

Shape letters: N prefix rows, M rows after projection, P prefix positions, R rows, W watched tokens, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longvlm.pipeline.engine.attention import rounded_up
from longvlm.pipeline.engine.batch import Batch, SuffixPass
from longvlm.pipeline.engine.grammar import Speller
from longvlm.pipeline.engine.growing import Growing
from longvlm.pipeline.engine.kv_budget import kv_budget
from longvlm.pipeline.engine.logits import choose, likelihoods, shares_of
from longvlm.pipeline.engine.masks import Masks
from longvlm.pipeline.engine.requests import Answer, Group, Stats
from longvlm.pipeline.engine.sequences import OpenGroup, RequestRow, StemRow, read_group
from longvlm.pipeline.models.contract import LanguageModel
from longvlm.pipeline.models.thinking import split_thinking
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
        self._speller = Speller(model.vocabulary)
        self._banned_ids, self._eos_ids = (tensor_on(model.device, ids) for ids in (model.banned_ids, model.eos_ids))
        self._queue: deque[OpenGroup] = deque()  # groups with rows that wait
        self._underway: list[RequestRow] = []
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
        return bool(rows or self._batch.rows or self._done)

    def _admit(self, source: Iterator[Group]) -> list[RequestRow]:
        """Drop what is done and take rows off the queue, as many as there are places and memory for."""
        self._batch.keep_open([group.prefix for group in self._queue])
        rows: list[RequestRow] = []
        while len(self._underway) < self.max_rows and (group := self._next_group(source)):
            row, fits = group.pending[0], self._fits(group.pending[0])
            if self._underway and not fits:
                break
            if not fits:  # prefixes kept for rows that still wait give way to the first of them
                self._batch.clear()
                fits = self._fits(row)
            row.start(self.recipe)
            self._underway.append(group.pending.popleft())
            if fits:
                rows.append(row)
            else:
                self._fail(row, self._out_of_memory(row))
        return rows

    def _next_group(self, source: Iterator[Group]) -> OpenGroup | None:
        """The first group with rows that wait, taken from the source if need be; None at its end."""
        while not (self._queue and self._queue[0].pending):
            if self._queue:
                self._queue.popleft()
            elif (group := next(source, None)) is None:
                return None
            else:
                opened, refused = read_group(self.model, self._speller, self.recipe, group)
                self._done += refused
                self._queue += [opened] if opened else []
        return self._queue[0]

    def _fits(self, row: RequestRow) -> bool:
        """Whether keys and values stay within their budget if this row comes in and all use their room."""
        rows = [*self._underway, row]
        prefixes = {id(prefix): len(prefix) for prefix in [*self._batch.prefixes, *(row.prefix for row in rows)]}
        tail = max(row.num_positions for row in rows)
        positions = len(prefixes) * rounded_up(max(prefixes.values())) + len(rows) * rounded_up(tail)
        return positions * self._batch.bytes_per_token <= self.kv_bytes

    def _prefill(self, rows: list[RequestRow]) -> None:
        """Read what is new: prefixes, then suffixes. Rows with options end here, others get their first token."""
        started_s, batch = time.perf_counter(), self._batch
        here = {id(prefix) for prefix in batch.prefixes}
        prefixes = {id(row.prefix): row.prefix for row in rows if id(row.prefix) not in here}
        batch.add_prefixes(list(prefixes.values()))
        to_begin = list(chain.from_iterable(row.to_begin() for row in rows))
        for done in batch.begin(to_begin):
            logits_WV = batch.logits(done.hidden)
            self._take_in(done, logits_WV)
            self._judge(done, logits_WV)
        self.stats.prefill_tokens += sum(map(len, prefixes.values())) + sum(len(row.suffix) for row in to_begin)
        self.stats.prefill_s += time.perf_counter() - started_s

    def _take_in(self, done: SuffixPass, logits_WV: Tensor) -> None:
        """Give the rows of a pass that are decoded their first token, and a place in the batch."""
        begun = [(one, one.row) for one in done.begun if isinstance(one.row, RequestRow)]
        if begun:
            rows = [row for _, row in begun]
            growing, masks = self._growing(rows), self._masks(rows)
            logits_RV = logits_WV[tensor_on(logits_WV.device, [one.watched.start for one, _ in begun])]
            self._extend(growing, logits_RV, masks)
            self._batch.add(done, [one for one, _ in begun], growing)

    def _growing(self, rows: Sequence[RequestRow]) -> Growing:
        """The answers of rows that have none yet."""
        drawn = None
        if self.recipe.temperature:
            drawn = to_device(pad_sequence([row.drawn for row in rows], batch_first=True), self.model.device)
        return Growing([len(row.suffix) for row in rows], [row.room for row in rows], drawn, self._eos_ids)

    def _masks(self, rows: Sequence[RequestRow]) -> Masks | None:
        """What keeps rows to their grammars; None where there are none."""
        spellings = {i: row.spelling for i, row in enumerate(rows) if row.spelling is not None}
        return Masks(spellings, self.model.device) if spellings else None

    def _extend(self, growing: Growing, logits_RV: Tensor, masks: Masks | None = None) -> None:
        """Choose each row's next token."""
        if len(self._banned_ids):
            logits_RV.index_fill_(1, self._banned_ids, float("-inf"))
        if masks is not None:
            masks.apply(logits_RV)
        growing.extend(choose(logits_RV, growing.drawn, self.recipe))

    def _decode(self, growing: Growing) -> None:
        """One more token for every open row, and again until half of the rows are done."""
        started_s, num_rows = time.perf_counter(), len(self._batch.rows)
        masks = self._masks(self._batch.rows)  # type: ignore[arg-type] # all of them are RequestRows
        while 2 * (num_open := growing.count_open()) > num_rows:
            if masks is None:
                self._batch.decode(self._extend)
            else:
                masks.take(growing)
                self._batch.decode(partial(self._extend, masks=masks), on_host=True)
            self.stats.num_steps += 1
            self.stats.decode_tokens += num_open
        self.stats.decode_s += time.perf_counter() - started_s

    def _collect(self, growing: Growing) -> None:
        """Take the rows' new tokens to the host, and finish the rows that are done."""
        rows: list[RequestRow] = self._batch.rows  # type: ignore[assignment] # all of them are
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

    def _judge(self, done: SuffixPass, logits_WV: Tensor) -> None:
        """Likelihoods of the options that begin with a pass's stems; a request whose options all have one is done."""
        judged = [(one.watched, one.row) for one in done.begun if isinstance(one.row, StemRow)]
        if not judged:
            return
        wanted = [(watched.start, stem.asked, i) for watched, stem in judged for i in stem.options]
        tokens = [at for watched, _ in judged for at in watched]
        found, seen_WP = Fetch(
            likelihoods(logits_WV, [(first, row.options[i]) for first, row, i in wanted]),
            done.seen[tensor_on(logits_WV.device, tokens)],
        ).wait()
        for (_, row, i), likelihood in zip(wanted, found.tolist(), strict=True):
            row.judged[i] = likelihood
        for (_, stem), part in zip(judged, torch.split(seen_WP, [len(watched) for watched, _ in judged]), strict=True):
            stem.asked.seen[stem.stem] = part
        for row in dict.fromkeys(stem.asked for _, stem in judged):
            if len(row.judged) == len(row.options):
                self._decide(row)

    def _decide(self, row: RequestRow) -> None:
        """Answer with the likeliest option."""
        shares = shares_of([row.judged[i] for i in range(len(row.options))], self.model.option_temperature)
        best = int(shares.argmax())
        if shares.isnan().any():
            self._fail(row, self._overflow())
        else:
            seen_P = row.seen[row.options[best][:-1]].mean(dim=0)
            self._finish(row, row.request.options[best], seen_P, tuple(shares.tolist()))

    def _close(self, row: RequestRow, seen_P: Tensor) -> None:
        """A row has come to its end: take its text."""
        if row.spelling is None:
            said = split_thinking(self.model.decode(row.new), is_open=row.is_thinking)
            if (fault := said.fault(len(row.new), is_ended=row.new[-1] in self.model.eos_ids)) is None:
                self._finish(row, said.answer or "", seen_P, thinking=said.thinking)
            else:
                self._fail(row, fault, said.thinking)
        elif row.spelling.error is None:
            self._finish(row, self._speller.text(row.new), seen_P)
        else:
            self._fail(row, TerminalError(ErrorCode.ANSWER_FAILED, row.spelling.error))

    def _finish(
        self,
        row: RequestRow,
        text: str,
        seen_P: Tensor,
        shares: tuple[float, ...] = (),
        thinking: str | None = None,
    ) -> None:
        attention = self.model.fold(seen_P[row.prefix.first_visual : len(row.prefix)], row.group.group.prefix)
        done = replace(self._counted(row), text=text, thinking=thinking, shares=shares, attention=attention)
        self._done.append(done)
        row.is_open = False
        self._underway.remove(row)

    def _fail(self, row: RequestRow, error: TerminalError, thinking: str | None = None) -> None:
        self._done.append(replace(self._counted(row), thinking=thinking, error=error))
        row.is_open = False
        self._underway.remove(row)

    def _counted(self, row: RequestRow) -> Answer:
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

    def _put_back(self, row: RequestRow) -> None:
        """Let a row be the next one to get a place."""
        row.group.pending.appendleft(row)
        if row.group in self._queue:
            self._queue.remove(row.group)
        self._queue.appendleft(row.group)

    def _overflow(self) -> TerminalError:
        return TerminalError(
            ErrorCode.ANSWER_FAILED,
            f"the model's output overflowed in {self.recipe.precision}; answer in bfloat16 or float32.",
        )

    def _out_of_memory(self, row: RequestRow) -> TerminalError:
        needed = (rounded_up(len(row.prefix)) + rounded_up(row.num_positions)) * self._batch.bytes_per_token
        return TerminalError(
            ErrorCode.MEMORY_LIMIT,
            f"the prompt's keys and values take {needed / 1e6:.0f} MB, more than there is room for beside the model; "
            "answer with a smaller --budget or on a larger device.",
        )
