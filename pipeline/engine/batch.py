"""The rows that are being answered at a time: their prefixes and tails on the device, and the forward passes over them.

Shape letters: T tokens of a pass, W watched ones of them, R rows, P prefix positions, D model width, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longvlm.pipeline.engine.attention import BranchStep, KeysValues, PrefixStep, Question, QuestionStep, Watch, chunked
from longvlm.pipeline.engine.blocks import Blocks
from longvlm.pipeline.engine.growing import Growing
from longvlm.pipeline.engine.linear import Linear
from longvlm.pipeline.transfer import tensor_on

MIN_TAIL_GROWTH = 16  # tokens: growing copies every tail, which costs about as much as a step does
# Tokens of one forward pass. Enough that the matrix products are bound by arithmetic, and the widest activations of a
# 7B model (11,008 channels) stay under 50 MB on a CPU, 400 MB on a GPU.
MAX_TOKENS = {"cpu": 2048, "cuda": 16_384}


@dataclass(eq=False)
class Prefix:
    """What the questions about one video share: the prompt's beginning and, from `first_visual` on, the video."""

    embeds: Tensor  # [P, D]
    first_visual: int

    def __len__(self) -> int:
        """Positions."""
        return len(self.embeds)


@dataclass(eq=False)
class Branch:
    """One row: what follows the prefix in its prompt, and the answer so far."""

    prefix: Prefix
    suffix: tuple[int, ...]
    num_watched: int = 1  # of the suffix's last tokens: what follows them is asked for
    room: int = 0  # new tokens that may follow
    new: list[int] = field(default_factory=list)
    is_open: bool = True

    @property
    def num_positions(self) -> int:
        """How long its tail may grow."""
        return len(self.suffix) + self.room


class Batch:
    """Branches under way. The passes of a model that attends over shared prefixes, in inference mode."""

    def __init__(self, llm: Any, device: torch.device) -> None:
        config = llm.config
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
        # Early layers look everywhere, late ones prepare the next word; in between, words look for what they speak of.
        self.watched = frozenset(range(self.num_layers // 3, max(2 * self.num_layers // 3, self.num_layers // 3 + 1)))
        self.clear()

    def clear(self) -> None:
        """Forget all branches."""
        self.branches: list[Branch] = []
        self.prefixes: list[Prefix] = []
        self.prefix_kv, self.tail_kv = KeysValues(), KeysValues()
        self.growing: Growing | None = None
        self.seen_RP = torch.zeros(0, 0, device=self.device)
        self._reach = 0  # how many positions of its tail any open branch has once its newest token is in
        self._step: BranchStep | None = None

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one position."""
        return 2 * self.num_layers * self.kv_shape[0] * self.kv_shape[1] * self.dtype.itemsize

    def keep_open(self, still_needed: Sequence[Prefix]) -> None:
        """Drop closed branches, and prefixes that neither an open branch nor the caller needs."""
        rows = [i for i, branch in enumerate(self.branches) if branch.is_open]
        if self.growing is not None and len(rows) < len(self.branches):
            rows_R = tensor_on(self.device, rows)
            self.growing.keep(rows_R)
            self.seen_RP = self.seen_RP[rows_R]
            self.branches = [self.branches[row] for row in rows]
        needed = {id(branch.prefix) for branch in self.branches} | {id(prefix) for prefix in still_needed}
        kept = [i for i, prefix in enumerate(self.prefixes) if id(prefix) in needed]
        self.prefixes = [self.prefixes[i] for i in kept]
        self._reach = max((len(branch.suffix) + len(branch.new) for branch in self.branches), default=0)
        self._rebuild(self.tail_kv, rows, KeysValues(), self._reach)
        self._rebuild(self.prefix_kv, kept, KeysValues(), max(map(len, self.prefixes), default=0))

    def add_prefixes(self, prefixes: Sequence[Prefix]) -> None:
        """Prefill prefixes that are not here yet, as many in a pass as it holds tokens."""
        waiting = iter(prefixes)
        for lengths in chunked(map(len, prefixes), MAX_TOKENS[self.device.type]):
            some = list(islice(waiting, len(lengths)))
            step = PrefixStep(lengths)
            positions_T = tensor_on(self.device, [position for length in lengths for position in range(length)])
            self._blocks.run(torch.cat([prefix.embeds for prefix in some]), positions_T, step)
            kept = range(len(self.prefixes))
            self.prefixes.extend(some)
            self._rebuild(self.prefix_kv, kept, step.made, max(map(len, self.prefixes)))

    def begin(self, branches: Sequence[Branch]) -> Iterator[tuple[list[Branch], Tensor, Tensor, KeysValues]]:
        """Run the suffixes of new branches whose prefixes are here, as many in a pass as it holds.

        Yields:
            some branches, the hidden states of their watched tokens [W, D] and these tokens' attention to the prefix
            [W, P], in the branches' order, and the keys and values of all, to be given to `add` for those that go on.
        """
        places = {id(prefix): i for i, prefix in enumerate(self.prefixes)}
        waiting = iter(branches)
        for lengths in chunked([len(branch.suffix) for branch in branches], MAX_TOKENS[self.device.type]):
            some = list(islice(waiting, len(lengths)))
            tails = self._empty_tails(len(some), max(lengths))
            watched = [  # row and position of each, and its place in the pass
                (row, at, end - len(branch.suffix) + at)
                for row, (branch, end) in enumerate(zip(some, accumulate(lengths), strict=True))
                for at in range(len(branch.suffix) - branch.num_watched, len(branch.suffix))
            ]
            row_W, position_W, token_W = zip(*watched, strict=True)
            watch, watching = Watch(self.watched), self._branch_step(some, tails, row_W)
            watching.begin(tensor_on(self.device, position_W), watch)
            questions = [Question(places[id(b.prefix)], len(b.prefix), len(b.suffix)) for b in some]
            tokens_W = tensor_on(self.device, token_W)
            step = QuestionStep(questions, tails, watching, tokens_W)
            starts_R = tensor_on(self.device, [question.prefix_length for question in questions])
            ids_T = tensor_on(self.device, [i for branch in some for i in branch.suffix])
            hidden_TD = self._blocks.run(self._embed(ids_T), starts_R[step.row_T] + step.position_T, step)
            yield some, hidden_TD[tokens_W], watch.seen, tails

    def add(
        self, branches: Sequence[Branch], rows: Sequence[int], tails: KeysValues, seen_RP: Tensor, growing: Growing
    ) -> None:
        """Take in branches after `begin`, with their rows of its tails, what they attended to and their first token."""
        rows_R = tensor_on(self.device, rows)
        made = KeysValues([layer[:, rows_R] for layer in tails.layers])
        kept = range(len(self.branches))
        self.branches.extend(branches)
        if self.growing is None:
            self.growing = growing
        else:
            self.growing.append(growing)
        self.seen_RP = torch.cat([_widened(self.seen_RP, seen_RP.shape[1]), seen_RP])
        self._reach = max(self._reach, *(len(branch.suffix) + 1 for branch in branches))
        self._rebuild(self.tail_kv, kept, made, self._reach)

    def decode(self) -> Tensor:
        """One step: every branch's newest token goes in; returns the logits of its next one, [R, V].

        Raises:
            ValueError: there are no branches.
        """
        if self.growing is None:
            raise ValueError("nothing has been added that could go on")
        if self._reach > self.tail_kv.num_positions:
            self._grow()
        self._reach += 1
        if self._step is None:
            self._step = self._branch_step(self.branches, self.tail_kv, range(len(self.branches)))
            self.seen_RP = _widened(self.seen_RP, self.prefix_kv.num_positions)
        watch = Watch(self.watched)
        positions_R = self._step.begin(self.growing.at_R, watch)
        hidden_RD = self._blocks.run(self._embed(self.growing.newest_R), positions_R, self._step)
        self.seen_RP += watch.seen * self.growing.is_open_R[:, None]
        return self.logits(hidden_RD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """What follows each token, [T, V]."""
        return self._head(hidden_TD)

    def _grow(self) -> None:
        """Give all tails room for some more steps."""
        most = max(branch.num_positions for branch in self.branches)
        num_positions = min(self._reach + max(MIN_TAIL_GROWTH, self._reach // 4), most)
        if num_positions > self.tail_kv.num_positions:
            self._rebuild(self.tail_kv, range(len(self.branches)), KeysValues(), num_positions)

    def _branch_step(self, branches: Sequence[Branch], tails: KeysValues, rows: Sequence[int]) -> BranchStep:
        places = {id(prefix): i for i, prefix in enumerate(self.prefixes)}
        lengths = [len(prefix) for prefix in self.prefixes]
        return BranchStep(self.prefix_kv, tails, lengths, [places[id(branch.prefix)] for branch in branches], rows)

    def _empty_tails(self, num_rows: int, num_positions: int) -> KeysValues:
        num_k, width = self.kv_shape
        shape = (2, num_rows, num_k, num_positions, width)
        return KeysValues([torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.num_layers)])

    def _rebuild(self, kv: KeysValues, kept: Sequence[int], more: KeysValues, num_positions: int) -> None:
        self._step = None
        if not kept and not more.layers:
            kv.clear()
        elif more.layers or len(kept) < kv.layers[0].shape[1] or num_positions > kv.num_positions:
            kv.select_and_append(kept, more, num_positions)


def _widened(seen_RP: Tensor, num_positions: int) -> Tensor:
    return pad(seen_RP, (0, num_positions - seen_RP.shape[1]))
