"""From logits to answers: the next token of each row, and the likelihood of given options.

Shape letters: R rows, V vocabulary, W tokens, N sequences of ids, I ids of the longest.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Sequence

import torch
from torch import Tensor

from longvlm.pipeline.transfer import tensor_on
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.fingerprint import fingerprint
from longvlm.schemas.recipe import AnswerRecipe


def draw(recipe: AnswerRecipe, question: str, number: int) -> Tensor:
    """The random numbers of a question's answer, uniform in [0, 1), float32 [number].

    They follow from seed and question, not from who else is in the batch; more of them begin with the same ones.
    """
    seed = int(fingerprint({"seed": recipe.seed, "question": question}), 16) >> 1
    return torch.rand(number, generator=torch.Generator().manual_seed(seed))


def choose(logits_RV: Tensor, drawn_R: Tensor | None, recipe: AnswerRecipe) -> Tensor:
    """The next token of each row, [R]: the likeliest, or drawn from the smallest set that holds `top_p` of probability.

    Sampling is of softmax(logits / temperature), by a uniform number a row. Where logits overflowed to NaN, it is -1.
    """
    most_R, chosen_R = logits_RV.max(dim=1)
    if drawn_R is not None:
        chosen_R = _sample(logits_RV.nan_to_num(), drawn_R, recipe)
    return chosen_R.masked_fill(most_R.isnan(), -1)


def _sample(logits_RV: Tensor, drawn_R: Tensor, recipe: AnswerRecipe) -> Tensor:
    probs_RV, ids_RV = (logits_RV.float() / recipe.temperature).softmax(dim=1).sort(dim=1, descending=True)
    up_to_RV = probs_RV.cumsum(dim=1)
    is_kept_RV = up_to_RV - probs_RV < recipe.top_p  # what is likelier than each; the first always stays
    is_kept_RV[:, 0] = True
    kept_R = (probs_RV * is_kept_RV).sum(dim=1)
    at_R = torch.searchsorted(up_to_RV, (drawn_R * kept_R)[:, None], right=True)
    last_R = is_kept_RV.sum(dim=1, keepdim=True) - 1  # rounding must not lead past what is kept
    return ids_RV.gather(1, at_R.minimum(last_R))[:, 0]


def distinct_endings(options: Sequence[str], ids: Sequence[tuple[int, ...]], end: int) -> list[tuple[int, ...]]:
    """The ids of each option, closed by the end mark where another one goes on from it ("red", "red car").

    Raises:
        TerminalError: ANSWER_FAILED if two options have the same ids, or one has none.
    """
    if not all(ids):
        raise TerminalError(ErrorCode.ANSWER_FAILED, f"the option {options[ids.index(())]!r} has no tokens; reword it.")
    first: dict[tuple[int, ...], str] = {}
    for option, own in zip(options, ids, strict=True):
        if first.setdefault(own, option) != option:
            raise TerminalError(
                ErrorCode.ANSWER_FAILED,
                f"the model's tokenizer cannot tell the options {first[own]!r} and {option!r} apart; reword one.",
            )
    return [(*own, end) if any(own == other[: len(own)] != other for other in ids) else own for own in ids]


def shares_of(likelihoods: Sequence[float], temperature: float) -> Tensor:
    """The shares that options have, [N], float64, by their log-likelihoods divided by a temperature.

    Above 1 they come nearer to each other, and which is the likeliest stays: temperature scaling (Guo et al., "On
    Calibration of Modern Neural Networks", ICML 2017, section 4.2), over whole options.
    """
    return (torch.tensor(likelihoods, dtype=torch.float64) / temperature).softmax(dim=0)


def likelihoods(logits_WV: Tensor, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
    """Log-likelihoods of some sequences of ids, [N], float32.

    Args:
        logits_WV: what follows each of some tokens.
        wanted: for each sequence the row of its first id's logits, the others following, and the ids.
    """
    longest, device = max(len(ids) for _, ids in wanted), logits_WV.device
    at_NI = tensor_on(device, [[first + min(i, len(ids) - 1) for i in range(longest)] for first, ids in wanted])
    id_NI = tensor_on(device, [[ids[min(i, len(ids) - 1)] for i in range(longest)] for _, ids in wanted])
    is_own_NI = tensor_on(device, [[i < len(ids) for i in range(longest)] for _, ids in wanted], torch.bool)
    logp_NI = logits_WV.float().log_softmax(dim=1)[at_NI, id_NI]
    return logp_NI.where(is_own_NI, 0).sum(dim=1)
