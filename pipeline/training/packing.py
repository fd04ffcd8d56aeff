"""Sequence packing: all conversations about a video in one training sequence, behind one copy of its visual tokens.

A packed sequence is the prompt's head, the video's rows, then one conversation after the other. A conversation attends
to the prefix and itself, and its positions go on where the prefix ends, so that losses and gradients are those of the
conversations one by one. For one-word answers that is about ten times cheaper.

Timed captions are learnt in the prefix itself: where a segment's time marker stands, each word of what is seen then
should be likely, in any order. So the marker comes to hold what its segment shows, for later questions to find.

Shape letters: R packed sequences, T positions of one, L supervised tokens.
"""

# ruff: noqa: N806 - arrays are named by their shape

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvlm.pipeline.models.contract import Extent, LanguageModel
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from longvlm.schemas.training import Average

Turns = tuple[tuple[str, str], ...]  # question and answer, one or more
_CACHED_CONVERSATIONS = 100_000  # whose ids are kept, of some hundred bytes each
PAD = -1  # no answer, and no conversation


@dataclass(frozen=True)
class Caption:
    """A timed caption: what is seen from a second on."""

    at_s: float
    text: str


@dataclass(frozen=True, eq=False)
class Example:
    """A training example: a video's tokens, and the conversations and captions about it."""

    prefix: VideoPrefix
    conversations: Sequence[Turns | Caption]


@dataclass(frozen=True, eq=False)
class PackedConversation:
    """A tokenized conversation, from the video's last row on; the ids of answers are supervised."""

    ids: NDArray[np.int64]
    answer_index: NDArray[np.int64]  # for each id the number of its answer in the conversation; PAD: not supervised


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One training sequence: the prompt's head, a video's rows, and conversations."""

    example: int  # whose rows, by its place in the batch
    head_ids: NDArray[np.int64]  # ahead of the video
    extent: Extent  # of the video
    conversations: list[PackedConversation]
    captions: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)  # a marker's place, words' ids

    @property
    def num_prefix(self) -> int:
        """Rows of head and video, which all conversations attend to."""
        return len(self.head_ids) + self.extent.num_rows

    @property
    def length(self) -> int:
        """In tokens."""
        return self.num_prefix + sum(len(conversation.ids) for conversation in self.conversations)

    @property
    def end(self) -> int:
        """The position of what follows the video."""
        return len(self.head_ids) + self.extent.num_positions


class ConversationTokenizer:
    """A tokenizer of whole conversations, as the model will be asked; each distinct one is tokenized once."""

    def __init__(self, model: LanguageModel, template: str) -> None:
        self.model, self.template = model, template
        prompt = model.lay_out("?", 1, template)
        self.head_ids = np.array(prompt.ids[: prompt.first_patch], np.int64)
        self.tokenize = lru_cache(_CACHED_CONVERSATIONS)(self._tokenize)

    def _tokenize(self, turns: Turns) -> PackedConversation:
        """One conversation: questions as `lay_out` puts them, and each answer with the mark that closes it.

        Raises:
            InputError: an answer has no tokens of its own, or a text holds a mark that only prompts may hold.
        """
        ids: list[int] = []
        answers: list[int] = []
        for number, (question, answer) in enumerate(turns):
            asked = self.model.turn_ids(question, self.template) if number else self._first_turn_ids(question)
            (told,) = self.model.option_ids([answer])
            closing = self.model.eos_ids[0]
            texts = (*told, *asked) if number else told  # `lay_out` has seen to the first question
            if closing in texts or {*texts} & {*self.model.banned_ids}:
                raise InputError("it holds a mark of the video's place or of an answer's end; take that out.")
            ids += [*asked, *told, closing]
            answers += [PAD] * len(asked) + [number] * (len(told) + 1)
        return PackedConversation(np.array(ids, np.int64), np.array(answers, np.int64))

    def tokenize_caption(self, caption: Caption, prefix: VideoPrefix) -> tuple[int, NDArray[np.int64]]:
        """Tokenize a caption: where among the video's rows its segment's marker ends, and the ids of its words.

        Raises:
            InputError: prompts of this model have no markers, or the caption has no words of its own.
        """
        place = self.model.caption_row(prefix, caption.at_s)
        (words,) = self.model.option_ids([caption.text])
        return place, np.array(words, np.int64)

    def _first_turn_ids(self, question: str) -> tuple[int, ...]:
        """The ids of a prompt from the video's last row on."""
        prompt = self.model.lay_out(question, 1, self.template)
        return prompt.ids[prompt.first_patch + 1 :]


@dataclass
class PackingResult:
    """The packed sequences of a batch of examples, and what could not be packed."""

    sequences: list[PackedSequence] = field(default_factory=list)
    refused: list[tuple[int, int, str]] = field(default_factory=list)  # example, its conversation, and why


def pack(tokenizer: ConversationTokenizer, examples: Iterable[Example], max_length: int) -> PackingResult:
    """Pack a batch of examples, each into as few sequences as hold it; conversations that are too long are refused.

    Args:
        tokenizer: of the model in training.
        examples: a batch.
        max_length: of a sequence, in tokens; the model's context holds as well.
    """
    packed = PackingResult()
    longest = min(max_length, tokenizer.model.context)
    for number, example in enumerate(examples):
        extent = tokenizer.model.extent(example.prefix)
        current = PackedSequence(number, tokenizer.head_ids, extent, [])
        for place, turns in enumerate(example.conversations):
            try:
                if isinstance(turns, Caption):
                    current.captions.append(tokenizer.tokenize_caption(turns, example.prefix))
                    continue
                conversation = tokenizer.tokenize(turns)
                _check_length(current.num_prefix + len(conversation.ids), extent.num_rows, longest)
            except (InputError, TerminalError) as error:
                packed.refused.append((number, place, str(error)))
                continue
            if current.length + len(conversation.ids) > longest:
                packed.sequences.append(current)
                current = PackedSequence(number, tokenizer.head_ids, extent, [])
            current.conversations.append(conversation)
        if current.conversations or current.captions:
            packed.sequences.append(current)
    return packed


def _check_length(length: int, num_rows: int, longest: int) -> None:
    if length > longest:
        raise TerminalError(
            ErrorCode.PROMPT_TOO_LONG,
            f"{num_rows} visual tokens and the conversation make {length} tokens, more than the {longest} that a "
            "sequence may have; lower tokens_per_segment or raise max_length, as far as the model's context goes.",
        )


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """A batch of packed sequences, padded to the longest, as tensors of one device."""

    ids: Tensor  # [R, T]: 0 where rows of a video go, and at the end
    position_ids: Tensor  # [R, T]: within the prefix and one conversation; of rows of a video, as if each had its own
    conversation_ids: Tensor  # [R, T]: 0 in a prefix, 1.. in a conversation, PAD at the end
    visual_spans: list[tuple[int, int, int]]  # for each sequence: its example, and where its rows begin and end
    label_positions: Tensor  # [L]: which of the R * T positions predict a supervised token ...
    labels: Tensor  # [L]: ... that token ...
    weights: Tensor  # [L]: ... and its share of the loss

    @property
    def num_tokens(self) -> int:
        """Positions that are no padding."""
        return int((self.conversation_ids != PAD).sum())

    def attention_mask(self) -> Tensor:
        """The causal mask, bool [R, 1, T, T]: what came before, in the prefix or in one's own conversation."""
        num_positions = self.conversation_ids.shape[1]
        order_T = torch.arange(num_positions, device=self.conversation_ids.device)
        query, key = self.conversation_ids[:, :, None], self.conversation_ids[:, None, :]
        return (((key == 0) | (key == query)) & (order_T[None, :] <= order_T[:, None]))[:, None]


def collate(sequences: Sequence[PackedSequence], average: Average, device: torch.device) -> TrainBatch:
    """Collate packed sequences into a batch. Each label weighs 1, or each answer as a whole (`average`)."""
    num_positions = max(sequence.length for sequence in sequences)
    ids_RT, positions_RT = (np.zeros((len(sequences), num_positions), np.int64) for _ in range(2))
    conversation_RT = np.full((len(sequences), num_positions), PAD, np.int64)
    visual_spans, label_positions, labels, weights = [], [], [], []
    for number, sequence in enumerate(sequences):
        at = sequence.num_prefix
        for place, words in sequence.captions:
            label_positions.append(np.full(len(words), number * num_positions + len(sequence.head_ids) + place))
            labels.append(words)
            weights.append(np.full(len(words), 1 / len(words) if average == "answer" else 1.0))
        ids_RT[number, : len(sequence.head_ids)] = sequence.head_ids
        positions_RT[number, :at], conversation_RT[number, :at] = np.arange(at), 0
        visual_spans.append((sequence.example, len(sequence.head_ids), at))
        for index, conversation in enumerate(sequence.conversations, start=1):
            here = slice(at, at + len(conversation.ids))
            ids_RT[number, here], conversation_RT[number, here] = conversation.ids, index
            positions_RT[number, here] = np.arange(sequence.end, sequence.end + len(conversation.ids))
            supervised = np.flatnonzero(conversation.answer_index != PAD)
            answers = conversation.answer_index[supervised]
            # What predicts a token stands before it, and a conversation never begins with an answer.
            label_positions.append(number * num_positions + at + supervised - 1)
            labels.append(conversation.ids[supervised])
            weights.append(1 / np.bincount(answers)[answers] if average == "answer" else np.ones(len(supervised)))
            at = here.stop
    arrays = [
        ids_RT,
        positions_RT,
        conversation_RT,
        *(np.concatenate(parts) for parts in (label_positions, labels, weights)),
    ]
    ids, position_ids, conversation_ids, at_L, labels_L, weights_L = (
        torch.from_numpy(array).to(device) for array in arrays
    )
    return TrainBatch(ids, position_ids, conversation_ids, visual_spans, at_L, labels_L, weights_L.float())
