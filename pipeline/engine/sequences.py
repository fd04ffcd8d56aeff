"""Groups made ready: each video's prefix embedded once, each question laid out as a row behind it.

Shape letters: N prefix rows, M rows after projection, C tower channels, D model width, W watched tokens, P prefix
positions.
"""

# ruff: noqa: N806 - tensors are named by their shape

import time
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from longvlm.pipeline.engine.batch import PromptPrefix, Row
from longvlm.pipeline.engine.grammar import Speller, Spelling
from longvlm.pipeline.engine.logits import distinct_endings, draw
from longvlm.pipeline.engine.requests import Answer, Group, Request
from longvlm.pipeline.models.contract import LanguageModel
from longvlm.pipeline.transfer import tensor_on
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from longvlm.schemas.recipe import AnswerRecipe


@dataclass(eq=False)
class RequestRow(Row):
    """A request on its way. One with options is decided by rows of its own, their stems."""

    group: "OpenGroup" = field(kw_only=True)
    request: Request = field(kw_only=True)
    options: tuple[tuple[int, ...], ...] = field(kw_only=True)  # the ids of each
    is_thinking: bool = field(kw_only=True)  # its prompt ends within thinking
    begun: Spelling | None = field(kw_only=True)  # an answer that a grammar holds, before its first token
    spelling: Spelling | None = field(init=False)  # and how far it has come
    drawn: Tensor = field(init=False)  # the random numbers of its tokens, where they are sampled
    started_s: float = field(init=False)
    judged: dict[int, float] = field(init=False)  # log-likelihoods of options
    seen: dict[tuple[int, ...], Tensor] = field(init=False)  # by stem, what was attended to on the way, [W, P]

    def start(self, recipe: AnswerRecipe) -> None:
        """Begin, or begin again, with nothing of an earlier try left."""
        self.new, self.is_open, self.judged, self.seen = [], True, {}, {}
        if recipe.temperature:
            self.drawn = draw(recipe, self.request.question, self.room)
        self.spelling = None if self.begun is None else self.begun.copy(self.room)
        self.started_s = time.perf_counter()

    def to_begin(self) -> "list[RequestRow] | list[StemRow]":
        """The rows that have to be run: itself, or one for each stem of its options."""
        stems = dict.fromkeys(option[:-1] for option in self.options)
        if not stems:
            return [self]
        return [StemRow(self.prefix, self.suffix + stem, 1 + len(stem), asked=self, stem=stem) for stem in stems]


@dataclass(eq=False)
class StemRow(Row):
    """What has to stand after a prompt for the last ids of some options to be judged; nothing is decoded."""

    asked: RequestRow = field(kw_only=True)
    stem: tuple[int, ...] = field(kw_only=True)  # these options but for their last ids

    @property
    def options(self) -> list[int]:
        """The places of the options that begin so."""
        return [i for i, ids in enumerate(self.asked.options) if ids[:-1] == self.stem]


@dataclass(eq=False)
class OpenGroup:
    """A group on its way: the prefix of its prompts, and the rows that wait for a place."""

    group: Group
    before: tuple[int, ...]  # the prompt's ids ahead of the video
    prefix: PromptPrefix
    pending: deque[RequestRow] = field(default_factory=deque)


def read_group(
    model: LanguageModel, speller: Speller, recipe: AnswerRecipe, group: Group
) -> tuple[OpenGroup | None, list[Answer]]:
    """A group as rows that wait, and the answers of those requests that cannot be answered at all.

    Raises:
        InputError: the tokens come from another tower than the model's, or the model lacks the template.
    """
    prefix_NC = group.prefix.rows
    if prefix_NC.ndim != 2 or prefix_NC.shape[1] != model.mm_hidden_size:
        raise InputError(
            f"the video's tokens are of shape {list(prefix_NC.shape)}, but {model.name} takes "
            f"[tokens, {model.mm_hidden_size}]; answer with a model made for the tower that indexed the video."
        )
    if len(prefix_NC) == 0 or not bool(prefix_NC.isfinite().all()):
        what = "not all numbers (NaN or infinity)" if len(prefix_NC) else "none at all"
        bad = TerminalError(ErrorCode.BAD_TOKENS, f"the video's stored tokens are {what}; index the video again.")
        return None, [Answer(r.key, num_visual_tokens=len(prefix_NC), error=bad) for r in group.requests]
    prompt = model.lay_out("?", 1, recipe.template)  # one place stands for all rows of the video
    before = prompt.ids[: prompt.first_patch]
    ids = tensor_on(model.device, before)
    rows = model.read(group.prefix)
    opened = OpenGroup(group, before, PromptPrefix.of(model.llm.get_input_embeddings()(ids), rows))
    refused = []
    for request in group.requests:
        try:
            opened.pending.append(_lay_out_row(model, speller, recipe, opened, request))
        except TerminalError as error:
            refused.append(Answer(request.key, num_visual_tokens=len(rows.embeds), error=error))
    return opened, refused


def _lay_out_row(
    model: LanguageModel, speller: Speller, recipe: AnswerRecipe, group: OpenGroup, request: Request
) -> RequestRow:
    """The row of a question.

    Raises:
        TerminalError: PROMPT_TOO_LONG; CUT_OFF where no answer that the grammar allows is as short as it would have to
            be; ANSWER_FAILED where the tokenizer cannot tell options apart, the vocabulary cannot spell the grammar, or
            the question contains a mark of the video's place.
    """
    prompt = model.lay_out(request.question, 1, recipe.template, may_think=request.is_free)
    if prompt.ids[: prompt.first_patch] != group.before:
        raise ValueError(f"the template {recipe.template} does not begin every prompt alike")
    suffix = prompt.ids[prompt.first_patch + 1 :]
    options: tuple[tuple[int, ...], ...] = ()
    if request.options:
        options = tuple(distinct_endings(request.options, model.option_ids(request.options), model.eos_ids[0]))
    least = max(map(len, options), default=1)
    free = model.context - len(group.prefix) - len(suffix)
    if free < least:
        raise TerminalError(
            ErrorCode.PROMPT_TOO_LONG,
            f"{len(group.prefix) - len(group.before)} visual tokens and the question make a prompt of "
            f"{len(group.prefix) + len(suffix)} tokens, but the model reads at most {model.context - least}; answer "
            "with a smaller --budget, or ask less.",
        )
    room = least if options else min(request.max_new_tokens or recipe.max_new_tokens, recipe.max_new_tokens, free)
    begun = None if request.grammar is None else speller.begin(request.grammar, room)
    return RequestRow(
        group.prefix,
        suffix,
        room=room,
        group=group,
        request=request,
        options=options,
        is_thinking=prompt.is_thinking,
        begun=begun,
    )
