"""Answers to questions about videos: left-padded batches, greedy or sampled decoding over a KV cache.

Shape letters: B rows of the batch, N prefix rows, C tower channels, T tokens, D model width, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from pipeline.language.longvlm import LongVLM
from pipeline.language.prompt import lay_out, tidy
from schemas.errors import ErrorCode, InputError, TerminalError
from schemas.recipe import AnswerRecipe, fingerprint


@dataclass(frozen=True, eq=False)
class Request:
    """A question about one video."""

    prefix: Tensor  # [N, C], the video's tokens before projection: global, then local in time order
    question: str


@dataclass(frozen=True)
class Answer:
    """What became of a request: a text, or the error that stands in its row. Counts are of what was reached."""

    text: str | None
    num_visual_tokens: int
    num_prompt_tokens: int
    num_new_tokens: int  # the end mark counted
    latency_ms: float
    error: TerminalError | None = None


@dataclass(frozen=True, eq=False)
class _Ready:
    """A request whose prompt is embedded."""

    index: int
    embeds: Tensor  # [T, D]
    room: int  # new tokens that may follow
    generator: torch.Generator


def answer_batch(model: LongVLM, requests: list[Request], recipe: AnswerRecipe) -> list[Answer]:
    """Answer some requests in one batch; one `Answer` each, in order.

    A request that cannot be answered carries its error and leaves the others alone. An answer does not depend on the
    batch it is made in (up to rounding; exactly enough for equal greedy ids in float32), sampled ones included: each
    request's random numbers come from the recipe's seed and its question. `latency_ms` is the wall time of the whole
    batch, the same for each of its answers.

    Raises:
        InputError: the tokens come from another tower than the model's, or the template is unknown.
    """
    started_s = time.perf_counter()
    ready: list[_Ready] = []
    errors: dict[int, TerminalError] = {}
    for index, request in enumerate(requests):
        try:
            ready.append(_prepare(model, index, request, recipe))
        except TerminalError as error:
            errors[index] = error
    generated = _generate(model, ready, recipe) if ready else []
    latency_ms = (time.perf_counter() - started_s) * 1000
    answers: dict[int, Answer] = {}
    for row, ids in zip(ready, generated, strict=True):
        text = tidy(model.decode(ids), recipe.template) if ids else None
        counts = (len(requests[row.index].prefix), len(row.embeds), len(ids))
        answers[row.index] = Answer(text, *counts, latency_ms, None if ids else _not_a_number(recipe))
    for index, failure in errors.items():
        answers[index] = Answer(None, len(requests[index].prefix), 0, 0, latency_ms, failure)
    return [answers[index] for index in range(len(requests))]


def _not_a_number(recipe: AnswerRecipe) -> TerminalError:
    return TerminalError(
        ErrorCode.ANSWER_FAILED, f"the model's output overflowed in {recipe.precision}; answer in bfloat16 or float32."
    )


@torch.inference_mode()
def _prepare(model: LongVLM, index: int, request: Request, recipe: AnswerRecipe) -> _Ready:
    """Check a request and embed its prompt.

    Raises:
        InputError: the prefix is not as wide as the projector's input.
        TerminalError: BAD_TOKENS, PROMPT_TOO_LONG, or what `lay_out` raises.
    """
    prefix_NC = request.prefix
    if prefix_NC.ndim != 2 or prefix_NC.shape[1] != model.projector.in_features:
        raise InputError(
            f"the video's tokens are of shape {list(prefix_NC.shape)}, but the projector of {model.name} takes "
            f"[tokens, {model.projector.in_features}]; answer with a model made for the tower that indexed the video."
        )
    if len(prefix_NC) == 0 or not bool(prefix_NC.isfinite().all()):
        what = "not all numbers (NaN or infinity)" if len(prefix_NC) else "none at all"
        raise TerminalError(ErrorCode.BAD_TOKENS, f"the video's stored tokens are {what}; index the video again.")
    prompt = lay_out(
        model.tokenizer, request.question, len(prefix_NC), use_start_end=model.use_start_end, name=recipe.template
    )
    room = min(recipe.max_new_tokens, model.context - len(prompt.ids))
    if room < 1:
        raise TerminalError(
            ErrorCode.PROMPT_TOO_LONG,
            f"{len(prefix_NC)} visual tokens and the question make a prompt of {len(prompt.ids)} tokens, but the "
            f"model reads at most {model.context - 1}; index with a recipe that keeps fewer tokens (such as paper).",
        )
    seed = int(fingerprint({"seed": recipe.seed, "question": request.question}), 16) >> 1
    embeds_TD = model.embed_prompt(prompt, prefix_NC)
    return _Ready(index, embeds_TD, room, torch.Generator().manual_seed(seed))


@torch.inference_mode()
def _generate(model: LongVLM, ready: list[_Ready], recipe: AnswerRecipe) -> list[list[int]]:
    """The new token ids of each row, its end mark included where it came to one; none where logits became NaN."""
    lengths = torch.tensor([len(row.embeds) for row in ready], device=model.device)
    embeds_BTD = pad_sequence([row.embeds for row in ready], batch_first=True, padding_side="left")
    padding_B = embeds_BTD.shape[1] - lengths
    mask_BT = (torch.arange(embeds_BTD.shape[1], device=model.device) >= padding_B[:, None]).long()
    inputs = {"inputs_embeds": embeds_BTD, "position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)}
    cache = DynamicCache(config=model.llm.config)
    new: list[list[int]] = [[] for _ in ready]
    open_rows = set(range(len(ready)))
    while open_rows:
        outputs = model.llm(**inputs, attention_mask=mask_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        overflowed = outputs.logits[:, -1].isnan().any(dim=1).tolist()
        chosen = _choose(outputs.logits[:, -1].nan_to_num(), ready, model, recipe)
        for row in list(open_rows):
            new[row] = [] if overflowed[row] else [*new[row], chosen[row]]
            if overflowed[row] or chosen[row] in model.eos_ids or len(new[row]) == ready[row].room:
                open_rows.remove(row)
        inputs = {
            "input_ids": torch.tensor(chosen, device=model.device)[:, None],
            "position_ids": mask_BT.sum(1, keepdim=True),
        }
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
    return new


def _choose(logits_BV: Tensor, ready: list[_Ready], model: LongVLM, recipe: AnswerRecipe) -> list[int]:
    """The next token of each row: the likeliest, or drawn from the smallest set that holds `top_p` of the probability.

    Sampling is of softmax(logits / temperature), on the CPU, so that a seed gives the same answer on any device.
    """
    logits_BV[:, model.banned_ids] = float("-inf")
    if recipe.temperature == 0:
        return logits_BV.argmax(dim=1).tolist()
    probs_BV, ids_BV = (logits_BV.float().cpu() / recipe.temperature).softmax(dim=1).sort(dim=1, descending=True)
    before_BV = probs_BV.cumsum(dim=1) - probs_BV  # what is likelier than each; the first always stays
    probs_BV[before_BV >= recipe.top_p] = 0
    probs_BV[:, 0].clamp_(min=torch.finfo(torch.float32).tiny)
    return [
        int(ids_V[torch.multinomial(probs_V, 1, generator=row.generator)])
        for probs_V, ids_V, row in zip(probs_BV, ids_BV, ready, strict=True)
    ]
