"""The rows that are being answered at a time: their prefixes and tails on the device, and the forward passes over them.

Shape letters: T tokens of a pass, W watched ones of them, R rows, P prefix positions, D model width, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longvlm.pipeline.engine.attention import (
    AttentionTotals,
    KeysValues,
    PrefixAttention,
    PrefixEnds,
    SuffixAttention,
    SuffixPlace,
    TailAttention,
    chunked,
    rounded_up,
)
from longvlm.pipeline.engine.blocks import Blocks
from longvlm.pipeline.engine.growing import Growing
from longvlm.pipeline.engine.linear import Linear
from longvlm.pipeline.engine.recorded import GraphMemory, RecordedStep
from longvlm.pipeline.models.contract import VideoRows
from longvlm.pipeline.transfer import tensor_on

# Tokens: growing copies every tail, which costs about as much as a step does, and on a GPU a new recording of it.
MIN_TAIL_GROWTH = {"cpu": 16, "cuda": 64}
# Tokens of one forward pass. Enough that the matrix products are bound by arithmetic, and the widest activations of a
# 7B model (11,008 channels) stay under 50 MB on a CPU, 400 MB on a GPU.
MAX_TOKENS = {"cpu": 2048, "cuda": 16_384}


@dataclass(eq=False)
class PromptPrefix:
    """What the prompts about one video share: their beginning and, from `first_visual` on, the video."""

    embeds: Tensor  # [P, D]
    first_visual: int
    positions: Tensor  # [P], or [3, P] of time, row and column
    end: int  # the position of what follows
    added: Tensor | None = None  # [L, P, D]: what is added to the hidden states after each of the first L blocks

    def __len__(self) -> int:
        """Rows of keys and values."""
        return len(self.embeds)

    @classmethod
    def of(cls, before_TD: Tensor, video: VideoRows) -> "PromptPrefix":
        """A prompt's beginning and the video after it."""
        first, embeds_PD = len(before_TD), torch.cat([before_TD, video.embeds])
        added = None if video.added is None else pad(video.added, (0, 0, first, 0))
        positions, end = torch.arange(len(embeds_PD), device=embeds_PD.device), len(embeds_PD)
        if video.positions is not None:
            text_3T, video_3M = positions[:first].expand(3, first), video.positions + first
            positions, end = torch.cat([text_3T.to(video_3M.dtype), video_3M], dim=1), first + video.num_positions
        return cls(embeds_PD, first, positions, end, added)


@dataclass(eq=False)
class Row:
    """One row of a batch: what follows the prefix in its prompt, and the answer so far."""

    prefix: PromptPrefix
    suffix: tuple[int, ...]
    num_watched: int = 1  # of the suffix's last tokens: what follows them is asked for
    room: int = 0  # new tokens that may follow
    new: list[int] = field(default_factory=list)
    is_open: bool = True

    @property
    def num_positions(self) -> int:
        """How long its tail may grow."""
        return len(self.suffix) + self.room


@dataclass(frozen=True, eq=False)
class Begun:
    """A row whose suffix has just been read, and where it lies in the pass that did so."""

    row: Row
    place: int  # of its tail
    watched: range  # its own among the watched tokens


@dataclass(frozen=True, eq=False)
class SuffixPass:
    """What a pass over the suffixes of some new rows made of them."""

    begun: list[Begun]
    hidden: Tensor  # [W, D], of the watched tokens
    seen: Tensor  # [W, P], how much these attend to the prefix
    tails: KeysValues  # by place


class Batch:
    """Rows under way. The passes of a model that attends over shared prefixes, in inference mode."""

    def __init__(self, llm: Any, device: torch.device) -> None:
        config = llm.config.get_text_config()
        self.device = device
        self._blocks, self._head, self._embed = (
            Blocks(llm),
            Linear([llm.get_output_embeddings()]),
            llm.get_input_embeddings(),
        )
        self.num_layers = config.num_hidden_layers
        self.kv_shape = (
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )
        self.dtype = self._embed.weight.dtype
        can_record = device.type == "cuda" and self._blocks.has_fixed_rotary
        self._graph_memory = GraphMemory(device) if can_record else None
        # Early layers look everywhere, late ones prepare the next word; in between, words look for what they speak of.
        self.watched = frozenset(range(self.num_layers // 3, max(2 * self.num_layers // 3, self.num_layers // 3 + 1)))
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.rows: list[Row] = []
        self.prefixes: list[PromptPrefix] = []
        self.prefix_kv, self.tail_kv = KeysValues(), KeysValues()
        self.growing: Growing | None = None
        self.seen_RP = torch.zeros(0, 0, device=self.device)
        self._reach = 0  # how many positions of its tail any open row has once its newest token is in
        self._step: RecordedStep | None = None  # of these rows and prefixes, as they lie now
        self._logits_RV = self.seen_RP  # what the last step gave, where the host takes part in choosing

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one position."""
        return 2 * self.num_layers * self.kv_shape[0] * self.kv_shape[1] * self.dtype.itemsize

    def keep_open(self, still_needed: Sequence[PromptPrefix]) -> None:
        """Drop closed rows, and prefixes that neither an open row nor the caller needs."""
        still_open = [i for i, row in enumerate(self.rows) if row.is_open]
        if self.growing is not None and len(still_open) < len(self.rows):
            open_R = tensor_on(self.device, still_open)
            self.growing.keep(open_R)
            self.seen_RP = self.seen_RP[open_R]
            self.rows = [self.rows[i] for i in still_open]
        needed = {id(row.prefix) for row in self.rows} | {id(prefix) for prefix in still_needed}
        kept = [i for i, prefix in enumerate(self.prefixes) if id(prefix) in needed]
        self.prefixes = [self.prefixes[i] for i in kept]
        self._reach = max((len(row.suffix) + len(row.new) for row in self.rows), default=0)
        self._rebuild(self.tail_kv, still_open, KeysValues(), self._tail_room())
        self._rebuild(self.prefix_kv, kept, KeysValues(), max(map(len, self.prefixes), default=0))

    def add_prefixes(self, prefixes: Sequence[PromptPrefix]) -> None:
        """Prefill prefixes that are not here yet, as many in a pass as it holds tokens."""
        waiting = iter(prefixes)
        for lengths in chunked(map(len, prefixes), MAX_TOKENS[self.device.type]):
            some = list(islice(waiting, len(lengths)))
            attention = PrefixAttention(lengths)
            embeds_TD, positions = (
                torch.cat([prefix.embeds for prefix in some]),
                torch.cat([prefix.positions for prefix in some], dim=-1),
            )
            added = [prefix.added for prefix in some if prefix.added is not None]  # all of a model's prefixes, or none
            self._blocks.run(embeds_TD, positions, attention, torch.cat(added, dim=1) if added else None)
            kept = range(len(self.prefixes))
            self.prefixes.extend(some)
            self._rebuild(self.prefix_kv, kept, attention.made, max(map(len, self.prefixes)))

    def begin(self, rows: Sequence[Row]) -> Iterator[SuffixPass]:
        """Run the suffixes of new rows whose prefixes are here, as many in a pass as it holds tokens.

        A pass is of some rows, in their order; `add` takes in those of them that go on.
        """
        waiting = iter(rows)
        for lengths in chunked([len(row.suffix) for row in rows], MAX_TOKENS[self.device.type]):
            some = list(islice(waiting, len(lengths)))
            ends = accumulate(row.num_watched for row in some)
            begun = [
                Begun(row, place, range(end - row.num_watched, end))
                for place, (row, end) in enumerate(zip(some, ends, strict=True))
            ]
            tails = self._empty_tails(len(some), max(lengths))
            watching = self._tail_attention(some, tails, [one.place for one in begun for _ in one.watched])
            totals = AttentionTotals(self.watched)
            watching.begin(_watched(self.device, some, lengths), totals)
            watched_W = _watched(self.device, some, accumulate(lengths))
            attention = SuffixAttention(self._suffix_places(some), tails, watching, watched_W)
            starts_R = tensor_on(self.device, [row.prefix.end for row in some])
            ids_T = tensor_on(self.device, [i for row in some for i in row.suffix])
            positions_T = starts_R[attention.row_T] + attention.position_T
            hidden_TD = self._blocks.run(self._embed(ids_T), positions_T, attention)
            yield SuffixPass(begun, hidden_TD[watched_W], totals.seen, tails)

    def add(self, done: SuffixPass, begun: Sequence[Begun], growing: Growing) -> None:
        """Take in some rows of a pass, of which one token each was watched, with the first tokens of their answers."""
        places_R = tensor_on(self.device, [one.place for one in begun])
        seen_RP = done.seen[tensor_on(self.device, [one.watched.start for one in begun])]
        made = KeysValues([layer[:, places_R] for layer in done.tails.layers])
        kept = range(len(self.rows))
        self.rows.extend(one.row for one in begun)
        if self.growing is None:
            self.growing = growing
        else:
            self.growing.append(growing)
        self.seen_RP = torch.cat([_widened(self.seen_RP, seen_RP.shape[1]), seen_RP])
        self._reach = max(self._reach, *(len(one.row.suffix) + 1 for one in begun))
        self._rebuild(self.tail_kv, kept, made, self._tail_room())

    def decode(self, extend: Callable[[Growing, Tensor], None], *, on_host: bool = False) -> None:
        """One step: every row's newest token goes in, and its next one comes of the logits.

        Args:
            extend: gives every open row its next token, from logits [R, V].
            on_host: the host takes part in `extend`. Else it neither waits for the device nor gives it numbers of the
                host's, so that it is recorded with the step on a GPU.

        Raises:
            ValueError: there are no rows.
        """
        if self.growing is None:
            raise ValueError("nothing has been added that could go on")
        if self._reach > self.tail_kv.num_positions:
            self._rebuild(self.tail_kv, range(len(self.rows)), KeysValues(), self._tail_room())
        self._reach += 1
        if self._step is None:
            self._step = self._new_step(self.growing, self._keep_logits if on_host else extend)
        self._step()
        if on_host:
            extend(self.growing, self._logits_RV)

    def _keep_logits(self, _: Growing, logits_RV: Tensor) -> None:
        """Part of a recorded step: the logits lie where every replay writes them, for as long as they are held here."""
        self._logits_RV = logits_RV

    def _new_step(self, growing: Growing, extend: Callable[[Growing, Tensor], None]) -> RecordedStep:
        """The step over what is here now, which changes nothing but the numbers in its tensors."""
        attention = self._tail_attention(self.rows, self.tail_kv, range(len(self.rows)))
        self.seen_RP = seen_RP = _widened(self.seen_RP, self.prefix_kv.num_positions)

        def step() -> None:
            totals = AttentionTotals(self.watched)
            positions_R = attention.begin(growing.at_R, totals)
            hidden_RD = self._blocks.run(self._embed(growing.newest_R), positions_R, attention)
            seen_RP.add_(totals.seen * growing.is_open_R[:, None])
            extend(growing, self.logits(hidden_RD))

        return RecordedStep(step, self._graph_memory)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """What follows each token, [T, V]."""
        return self._head(hidden_TD)

    def _tail_room(self) -> int:
        """Positions of every tail that do for some more steps."""
        most = max((row.num_positions for row in self.rows), default=0)
        return min(self._reach + max(MIN_TAIL_GROWTH[self.device.type], self._reach // 4), most)

    def _tail_attention(self, rows: Sequence[Row], tails: KeysValues, row_of_token: Sequence[int]) -> TailAttention:
        lengths, ends = zip(*((len(prefix), prefix.end) for prefix in self.prefixes), strict=True)
        videos = [place.video for place in self._suffix_places(rows)]
        return TailAttention(self.prefix_kv, tails, PrefixEnds(lengths, ends), videos, row_of_token)

    def _suffix_places(self, rows: Sequence[Row]) -> list[SuffixPlace]:
        places = {id(prefix): i for i, prefix in enumerate(self.prefixes)}
        return [SuffixPlace(places[id(row.prefix)], len(row.prefix), len(row.suffix)) for row in rows]

    def _empty_tails(self, num_rows: int, num_positions: int) -> KeysValues:
        num_k, width = self.kv_shape
        shape = (2, num_rows, num_k, rounded_up(num_positions), width)
        return KeysValues([torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.num_layers)])

    def _rebuild(self, kv: KeysValues, kept: Sequence[int], more: KeysValues, num_positions: int) -> None:
        self._step, num_positions = None, rounded_up(num_positions)
        if not kept and not more.layers:
            kv.clear()
        elif more.layers or len(kept) < kv.layers[0].shape[1] or num_positions > kv.num_positions:
            kv.select_and_append(kept, more, num_positions)


def _watched(device: torch.device, rows: Sequence[Row], ends: Iterable[int]) -> Tensor:
    """The watched tokens of rows whose suffixes end there, [W]."""
    last = zip(rows, ends, strict=True)
    return tensor_on(device, [at for row, end in last for at in range(end - row.num_watched, end)])


def _widened(seen_RP: Tensor, num_positions: int) -> Tensor:
    return pad(seen_RP, (0, num_positions - seen_RP.shape[1]))
