"""Transformers' own path: one question at a time, with the whole prompt run again for each. The engine is held to it.

Shape letters: F frames, N prefix rows, M rows after projection, T tokens, K tokens of an option, D model width,
V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from longvlm.pipeline.engine.grammar import Speller, Spelling
from longvlm.pipeline.engine.logits import distinct_endings, shares_of
from longvlm.pipeline.engine.masks import Masks
from longvlm.pipeline.engine.requests import Answer, Request
from longvlm.pipeline.models.contract import Prompt, Vocabulary
from longvlm.pipeline.models.llava.checkpoint import find_llava
from longvlm.pipeline.models.longvlm.model import LongVLM
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.vision.pixels import Pixels
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import AnswerRecipe


class Words(Protocol):
    """How a model is asked, and what its ids say: the part of a LanguageModel that needs no weights."""

    def lay_out(self, question: str, num_visual_tokens: int, template: str) -> Prompt:
        """See `LanguageModel.lay_out`."""

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """See `LanguageModel.option_ids`."""

    def decode(self, ids: Iterable[int]) -> str:
        """See `LanguageModel.decode`."""


@dataclass(frozen=True, eq=False)
class View:
    """A video as a model is shown it."""

    num_rows: int  # M
    inputs: Callable[[Tensor, int], dict[str, Tensor]]  # ids [T] and where the video begins -> what `forward` takes


class _Held(LogitsProcessor):
    """Keeps the one answer that `generate` makes greedily to its grammar."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the parameters of the interface
        """Scores of which only the token that stands is above the others, [1, V]."""
        allowed = scores.clone()
        Masks({0: self._spelling}, scores.device).apply(allowed)
        stands = self._spelling.take(int(allowed.argmax()))
        return torch.full_like(scores, float("-inf")).index_fill_(1, torch.tensor([stands], device=scores.device), 0.0)


class Plain:
    """A model of transformers, asked greedily, by its own `generate` and `forward`."""

    option_temperature = 1.0  # see `LanguageModel.option_temperature`

    def __init__(
        self, llm: Any, words: Words, recipe: AnswerRecipe, *, vocabulary: Vocabulary, banned_ids: Sequence[int]
    ) -> None:
        self.llm, self.words, self.recipe = llm, words, recipe
        self.context = int(llm.config.get_text_config().max_position_embeddings)
        self.eos_ids, self._speller = vocabulary.eos_ids, Speller(vocabulary)
        # In place of the checkpoint's own, whose sampling and penalties `generate` would fall back on. Ids that stand
        # for no text are suppressed, as the engine does.
        llm.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.eos_ids[0],
            suppress_tokens=list(banned_ids) or None,
        )

    @torch.inference_mode()
    def answer(self, view: View, request: Request) -> Answer:
        """What the engine answers too: the likeliest option, or decoded text, kept to a grammar if there is one.

        A request that cannot be answered carries its error.
        """
        started_s = time.perf_counter()
        try:
            answer = self._choose(view, request) if request.options else self._generate(view, request)
        except TerminalError as error:
            answer = Answer(request.key, error=error)
        return replace(answer, num_visual_tokens=view.num_rows, latency_ms=(time.perf_counter() - started_s) * 1e3)

    def _choose(self, view: View, request: Request) -> Answer:
        """The likeliest option, by one forward pass over prompt and option each."""
        options = distinct_endings(request.options, self.words.option_ids(request.options), self.eos_ids[0])
        prompt = self._lay_out(view, request.question, max(map(len, options)))
        likelihoods = []
        for option in options:
            inputs = view.inputs(self._tensor([*prompt.ids, *option]), prompt.first_patch)
            logits_KV = self.llm(**inputs, logits_to_keep=len(option) + 1).logits[0, :-1]
            logp_KV = logits_KV.float().log_softmax(dim=1)
            likelihoods.append(sum(float(logp_KV[i, token]) for i, token in enumerate(option)))
        shares = shares_of(likelihoods, self.option_temperature)
        text = request.options[int(shares.argmax())]
        return Answer(request.key, text, tuple(shares.tolist()), num_prompt_tokens=len(prompt.ids))

    def _generate(self, view: View, request: Request) -> Answer:
        prompt = self._lay_out(view, request.question, 1)
        most = min(request.max_new_tokens or self.recipe.max_new_tokens, self.recipe.max_new_tokens)
        room = min(most, self.context - len(prompt.ids))
        held = LogitsProcessorList()
        if request.grammar is not None:
            held.append(_Held(self._speller.begin(request.grammar, room)))
        inputs = view.inputs(self._tensor(prompt.ids), prompt.first_patch)
        made_T = self.llm.generate(**inputs, max_new_tokens=room, logits_processor=held)[0]
        new = made_T[len(prompt.ids) if "input_ids" in inputs else 0 :].tolist()
        text = self.words.decode(new) if request.grammar is None else self._speller.text(new)
        return Answer(request.key, text, num_prompt_tokens=len(prompt.ids), num_new_tokens=len(new))

    def _lay_out(self, view: View, question: str, least: int) -> Prompt:
        """The prompt; TerminalError (PROMPT_TOO_LONG) if the context has no room for `least` more tokens."""
        prompt = self.words.lay_out(question, view.num_rows, self.recipe.template)
        if len(prompt.ids) + least > self.context:
            raise TerminalError(
                ErrorCode.PROMPT_TOO_LONG,
                f"{view.num_rows} visual tokens and the question make a prompt of {len(prompt.ids)} tokens, but the "
                f"model reads at most {self.context - least}; show it less, or ask less.",
            )
        return prompt

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.llm.device)


class PlainLlava(Plain):
    """A whole LLaVA as transformers loads and runs it: its own tower, projector and pooling, over frames.

    Raises:
        InputError: the checkpoint is not one that can be answered with (see `find_llava`).
    """

    def __init__(self, model: str, recipe: AnswerRecipe, device: str = "cpu") -> None:
        checkpoint = find_llava(model)
        config, chat = checkpoint.config, checkpoint.chat()
        logging.disable_progress_bar()  # a command shows its own
        llm = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, dtype=getattr(torch, recipe.precision))
        banned_ids = (*sorted(chat.marks), *range(chat.num_ids, config.text_config.vocab_size))
        vocabulary = Vocabulary(chat.tokenizer.backend_tokenizer, tuple(checkpoint.eos_ids(chat)))
        super().__init__(llm.to(device).eval(), chat, recipe, vocabulary=vocabulary, banned_ids=banned_ids)
        self._pixels = Pixels.from_folder(checkpoint.folder, config.vision_config.image_size)
        self._is_video = checkpoint.family.modality == "video"
        one, two = (self._count_rows(num_frames) for num_frames in (1, 2))
        self._rows_per_frame, self._rows_at_end = two - one, 2 * one - two

    @property
    def name(self) -> str:
        """Transformers' class."""
        return type(self.llm).__name__

    def most_frames(self, num_rows: int) -> int:
        """How many frames so many visual tokens hold; 0 if not even one."""
        return max((num_rows - self._rows_at_end) // self._rows_per_frame, 0)

    def show(self, frames: Tensor) -> View:
        """Show it RGB frames, uint8 [F, px, px, 3] on the CPU. It looks at them again with every question."""
        seen = self._seen(frames)

        def inputs(ids_T: Tensor, first_patch: int) -> dict[str, Tensor]:  # noqa: ARG001 - placeholders mark the place
            return {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None], **seen}

        return View(len(frames) * self._rows_per_frame + self._rows_at_end, inputs)

    def _seen(self, frames: Tensor) -> dict[str, Tensor]:
        pixels = self._pixels.prepare(frames, self.llm.device, self.llm.dtype)
        return {"pixel_values_videos": pixels[None]} if self._is_video else {"pixel_values": pixels}

    @torch.inference_mode()
    def _count_rows(self, num_frames: int) -> int:
        """Of a video with so many frames, asked of transformers itself: families pool and end videos differently."""
        side = self._pixels.image_size
        seen = self._seen(torch.zeros(num_frames, side, side, 3, dtype=torch.uint8))
        look = self.llm.get_video_features if self._is_video else self.llm.get_image_features
        features = look(**seen, return_dict=True).pooler_output
        return sum(len(part.flatten(0, -2)) for part in features)


class PlainLongVLM(Plain):
    """A LongVLM, which transformers does not know as a whole: its LLaMA, asked over projected tokens."""

    def __init__(self, model: LongVLM, recipe: AnswerRecipe) -> None:
        super().__init__(model.llm, model, recipe, vocabulary=model.vocabulary, banned_ids=model.banned_ids)
        self._model, self.option_temperature = model, model.option_temperature

    def show(self, prefix: VideoPrefix) -> View:
        """Show it a video's tokens."""
        with torch.inference_mode():
            rows_MD = self._model.project(prefix)

        def inputs(ids_T: Tensor, first_patch: int) -> dict[str, Tensor]:
            embeds_TD = self.llm.get_input_embeddings()(ids_T).clone()
            embeds_TD[first_patch : first_patch + len(rows_MD)] = rows_MD
            return {"inputs_embeds": embeds_TD[None], "attention_mask": torch.ones_like(ids_T)[None]}

        return View(len(rows_MD), inputs)
