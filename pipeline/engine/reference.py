"""Transformers' own path: one question at a time, with the whole prompt run again for each. The engine is held to it.

Shape letters: F frames, N prefix rows, M rows after projection, T tokens, K tokens of an option, D model width,
V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from longvlm.pipeline.engine.grammar import Speller, Spelling
from longvlm.pipeline.engine.logits import distinct_endings, shares_of
from longvlm.pipeline.engine.masks import Masks
from longvlm.pipeline.engine.requests import Answer, Request
from longvlm.pipeline.models.contract import LanguageModel, Prompt, View, WholeModel, Words
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.thinking import split_thinking
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import AnswerRecipe
from longvlm.schemas.tower import TowerSpec


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

    def __init__(self, model: WholeModel | LanguageModel, words: Words, recipe: AnswerRecipe) -> None:
        llm = model.llm
        self.llm, self.words, self.recipe = llm, words, recipe
        self.context = int(llm.config.get_text_config().max_position_embeddings)
        self.eos_ids, self._speller = model.vocabulary.eos_ids, Speller(model.vocabulary)
        # In place of the checkpoint's own, whose sampling and penalties `generate` would fall back on. Ids that stand
        # for no text are suppressed, as the engine does.
        llm.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.eos_ids[0],
            suppress_tokens=list(model.banned_ids) or None,
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
        prompt = self._lay_out(view, request, max(map(len, options)))
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
        prompt = self._lay_out(view, request, 1)
        most = min(request.max_new_tokens or self.recipe.max_new_tokens, self.recipe.max_new_tokens)
        room = min(most, self.context - len(prompt.ids))
        held = LogitsProcessorList()
        if request.grammar is not None:
            held.append(_Held(self._speller.begin(request.grammar, room)))
        inputs = view.inputs(self._tensor(prompt.ids), prompt.first_patch)
        made_T = self.llm.generate(**inputs, max_new_tokens=room, logits_processor=held)[0]
        new = made_T[len(prompt.ids) if "input_ids" in inputs else 0 :].tolist()
        counted = Answer(request.key, num_prompt_tokens=len(prompt.ids), num_new_tokens=len(new))
        if request.grammar is not None:
            return replace(counted, text=self._speller.text(new))
        said = split_thinking(self.words.decode(new), is_open=prompt.is_thinking)
        fault = said.fault(len(new), is_ended=new[-1] in self.eos_ids)
        return replace(counted, text=said.answer if fault is None else None, thinking=said.thinking, error=fault)

    def _lay_out(self, view: View, request: Request, least: int) -> Prompt:
        """The prompt; TerminalError (PROMPT_TOO_LONG) if the context has no room for `least` more tokens."""
        one = self.words.lay_out(request.question, 1, self.recipe.template, may_think=request.is_free)
        ids = (*one.ids[: one.first_patch], *view.ids, *one.ids[one.first_patch + 1 :])
        if len(ids) + least > self.context:
            raise TerminalError(
                ErrorCode.PROMPT_TOO_LONG,
                f"{view.num_rows} visual tokens and the question make a prompt of {len(ids)} tokens, but the "
                f"model reads at most {self.context - least}; show it less, or ask less.",
            )
        return Prompt(ids, one.first_patch, view.num_rows, one.is_thinking)

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.llm.device)


class PlainWhole(Plain):
    """A model that transformers knows as a whole, over frames."""

    def __init__(self, model: WholeModel, recipe: AnswerRecipe) -> None:
        super().__init__(model, model.words, recipe)
        self._model = model

    @property
    def name(self) -> str:
        """Transformers' class."""
        return type(self.llm).__name__

    def most_pictures(self, num_rows: int, tower: TowerSpec) -> int:
        """See `WholeModel.most_pictures`."""
        return self._model.most_pictures(num_rows, tower)

    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:
        """See `WholeModel.show`."""
        return self._model.show(frames, prefix)


class PlainTokens(Plain):
    """A language model that transformers does not know with its tower, asked over stored tokens."""

    def __init__(self, model: LanguageModel, recipe: AnswerRecipe) -> None:
        super().__init__(model, model, recipe)
        self._model, self.option_temperature = model, model.option_temperature

    def show(self, prefix: VideoPrefix) -> View:
        """Show it a video's tokens."""
        with torch.inference_mode():
            rows_MD = self._model.read(prefix).embeds

        def inputs(ids_T: Tensor, first_patch: int) -> dict[str, Tensor]:
            embeds_TD = self.llm.get_input_embeddings()(ids_T).clone()
            embeds_TD[first_patch : first_patch + len(rows_MD)] = rows_MD
            return {"inputs_embeds": embeds_TD[None], "attention_mask": torch.ones_like(ids_T)[None]}

        place = self._model.lay_out("?", 1, self.recipe.template)
        return View((place.ids[place.first_patch],) * len(rows_MD), inputs)
