"""Conversations packed behind one prefix: a video is read once, and all conversations about it branch off from there.

A packed sequence is the prompt's head, the video's rows, then one branch after the other. A branch sees the prefix and
itself, and its positions go on where the prefix ends, so that losses and gradients are those of the conversations one
by one. For one-word answers that is about ten times cheaper.

Timed captions are learnt in the prefix itself: where a segment's time marker stands, each word of what is seen then
should be likely, in any order. So the marker comes to hold what its segment shows, for later questions to find.

Shape letters: R packs, T positions of a pack, L supervised tokens.
"""

# ruff: noqa: N806 - arrays are named by their shape

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvlm.pipeline.models.contract import LanguageModel
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from longvlm.schemas.training import Average

Turns = tuple[tuple[str, str], ...]  # question and answer, one or more
_REMEMBERED = 100_000  # conversations whose ids are kept, of some hundred bytes each
PAD = -1


@dataclass(frozen=True)
class Caption:
    """What is seen from a second on."""

    at_s: float
    text: str


@dataclass(frozen=True, eq=False)
class Lesson:
    """A video's tokens, and the conversations and captions about it to learn from."""

    prefix: VideoPrefix
    conversations: Sequence[Turns | Caption]


@dataclass(frozen=True, eq=False)
class Branch:
    """A conversation from the video's last row on, as ids; those of answers are to be learnt."""

    ids: NDArray[np.int64]
    answer: NDArray[np.int64]  # for each id the number of its answer within the branch, or -1 where it is given


@dataclass(frozen=True, eq=False)
class Pack:
    """One sequence: the ids ahead of the video, its rows, and branches."""

    lesson: int  # whose rows, by their place in the batch
    before: NDArray[np.int64]
    num_rows: int
    branches: list[Branch]
    captions: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)  # a marker's place, words' ids

    @property
    def num_prefix(self) -> int:
        """Positions that all branches see."""
        return len(self.before) + self.num_rows

    @property
    def num_positions(self) -> int:
        """Its whole length."""
        return self.num_prefix + sum(len(branch.ids) for branch in self.branches)


class Speller:
    """Conversations to ids, as the model will be asked: each distinct text is tokenized once."""

    def __init__(self, model: LanguageModel, template: str) -> None:
        self.model, self.template = model, template
        prompt = model.lay_out("?", 1, template)
        self.before = np.array(prompt.ids[: prompt.first_patch], np.int64)
        self.spell = lru_cache(_REMEMBERED)(self._spell)

    def _spell(self, turns: Turns) -> Branch:
        """One conversation: questions as `lay_out` puts them, and each answer with the mark that closes it.

        Raises:
            InputError: an answer has no tokens of its own, or a text holds a mark that only prompts may hold.
        """
        ids: list[int] = []
        answers: list[int] = []
        for number, (question, answer) in enumerate(turns):
            asked = self.model.turn_ids(question, self.template) if number else self._first(question)
            (told,) = self.model.option_ids([answer])
            closing = self.model.eos_ids[0]
            texts = (*told, *asked) if number else told  # `lay_out` has seen to the first question
            if closing in texts or {*texts} & {*self.model.banned_ids}:
                raise InputError("it holds a mark of the video's place or of an answer's end; take that out.")
            ids += [*asked, *told, closing]
            answers += [PAD] * len(asked) + [number] * (len(told) + 1)
        return Branch(np.array(ids, np.int64), np.array(answers, np.int64))

    def caption(self, caption: Caption, times: SegmentTimes | None) -> tuple[int, NDArray[np.int64]]:
        """Where among the video's rows the marker of a caption's segment ends, and the ids of its words.

        Raises:
            InputError: prompts of this model have no markers, or the caption has no words of its own.
        """
        if times is None or not self.model.marker_ids(0.0):
            raise InputError("it is a timed caption, and prompts of this model have no time markers to learn it at.")
        segment = max(bisect_right(times.starts_s, caption.at_s) - 1, 0)
        markers = sum(len(self.model.marker_ids(start_s)) for start_s in times.starts_s[: segment + 1])
        (words,) = self.model.option_ids([caption.text])
        return times.num_global + sum(times.counts[: segment + 1]) + markers - 1, np.array(words, np.int64)

    def _first(self, question: str) -> tuple[int, ...]:
        """What follows the video's last row."""
        prompt = self.model.lay_out(question, 1, self.template)
        return prompt.ids[prompt.first_patch + 1 :]


@dataclass
class Packed:
    """A batch in packs, and what could not be packed."""

    packs: list[Pack] = field(default_factory=list)
    refused: list[tuple[int, int, str]] = field(default_factory=list)  # lesson, its conversation, and why


def pack(speller: Speller, lessons: Iterable[Lesson], max_length: int) -> Packed:
    """Every lesson in as few packs as hold it; a conversation that is longer than any may be is refused, with a reason.

    Args:
        speller: of the model that is to learn.
        lessons: a batch.
        max_length: positions of a pack at most; the model's context holds as well.
    """
    packed = Packed()
    longest = min(max_length, speller.model.context)
    for number, lesson in enumerate(lessons):
        num_rows = speller.model.count_rows(lesson.prefix)
        current = Pack(number, speller.before, num_rows, [])
        for place, turns in enumerate(lesson.conversations):
            try:
                if isinstance(turns, Caption):
                    current.captions.append(speller.caption(turns, lesson.prefix.times))
                    continue
                branch = speller.spell(turns)
                _check_length(current.num_prefix + len(branch.ids), num_rows, longest)
            except (InputError, TerminalError) as error:
                packed.refused.append((number, place, str(error)))
                continue
            if current.num_positions + len(branch.ids) > longest:
                packed.packs.append(current)
                current = Pack(number, speller.before, num_rows, [])
            current.branches.append(branch)
        if current.branches or current.captions:
            packed.packs.append(current)
    return packed


def _check_length(length: int, num_rows: int, longest: int) -> None:
    if length > longest:
        raise TerminalError(
            ErrorCode.PROMPT_TOO_LONG,
            f"{num_rows} visual tokens and the conversation make {length} tokens, more than the {longest} that a "
            "sequence may have; lower tokens_per_segment or raise max_length, as far as the model's context goes.",
        )


@dataclass(frozen=True, eq=False)
class Sheet:
    """Some packs side by side, padded to the longest, as tensors of one device."""

    ids: Tensor  # [R, T]: 0 where rows of a video go, and at the end
    positions: Tensor  # [R, T]: of each in its own conversation
    branch: Tensor  # [R, T]: 0 in a prefix, 1.. in a branch, -1 at the end
    rows_at: list[tuple[int, int, int]]  # for each pack: its lesson, and where its rows begin and end
    predicts: Tensor  # [L]: which of the R * T positions predict a token that is to be learnt ...
    labels: Tensor  # [L]: ... that token ...
    weights: Tensor  # [L]: ... and its share of the loss

    @property
    def num_tokens(self) -> int:
        """Positions that are no padding."""
        return int((self.branch != PAD).sum())

    def mask(self) -> Tensor:
        """Who sees whom, bool [R, 1, T, T]: what came before, in the prefix or in one's own branch."""
        num_positions = self.branch.shape[1]
        order_T = torch.arange(num_positions, device=self.branch.device)
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        return (((key == 0) | (key == query)) & (order_T[None, :] <= order_T[:, None]))[:, None]


def lay_side_by_side(packs: Sequence[Pack], average: Average, device: torch.device) -> Sheet:
    """Packs as one batch. Weights of labels are one each, or one for each answer (`average`)."""
    num_positions = max(pack.num_positions for pack in packs)
    ids_RT, positions_RT = (np.zeros((len(packs), num_positions), np.int64) for _ in range(2))
    branch_RT = np.full((len(packs), num_positions), PAD, np.int64)
    rows_at, predicts, labels, weights = [], [], [], []
    for number, pack in enumerate(packs):
        at = pack.num_prefix
        for place, words in pack.captions:
            predicts.append(np.full(len(words), number * num_positions + len(pack.before) + place))
            labels.append(words)
            weights.append(np.full(len(words), 1 / len(words) if average == "answer" else 1.0))
        ids_RT[number, : len(pack.before)] = pack.before
        positions_RT[number, :at], branch_RT[number, :at] = np.arange(at), 0
        rows_at.append((pack.lesson, len(pack.before), at))
        for index, branch in enumerate(pack.branches, start=1):
            here = slice(at, at + len(branch.ids))
            ids_RT[number, here], branch_RT[number, here] = branch.ids, index
            positions_RT[number, here] = np.arange(pack.num_prefix, pack.num_prefix + len(branch.ids))
            learnt = np.flatnonzero(branch.answer != PAD)
            answers = branch.answer[learnt]
            # What predicts a token stands before it, and a branch never begins with an answer.
            predicts.append(number * num_positions + at + learnt - 1)
            labels.append(branch.ids[learnt])
            weights.append(1 / np.bincount(answers)[answers] if average == "answer" else np.ones(len(learnt)))
            at = here.stop
    arrays = [ids_RT, positions_RT, branch_RT, *(np.concatenate(parts) for parts in (predicts, labels, weights))]
    ids, positions, branch_of, at_L, labels_L, weights_L = (torch.from_numpy(array).to(device) for array in arrays)
    return Sheet(ids, positions, branch_of, rows_at, at_L, labels_L, weights_L.float())
