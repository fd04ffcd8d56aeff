"""From logits to answers: the next token of each row, and the likelihood of given options.

Shape letters: R rows, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Sequence

import torch
from torch import Tensor

from schemas.errors import ErrorCode, TerminalError
from schemas.recipe import AnswerRecipe, fingerprint


def generator_for(recipe: AnswerRecipe, question: str) -> torch.Generator:
    """The random numbers of one question: they follow from seed and question, not from who else is in the batch."""
    seed = int(fingerprint({"seed": recipe.seed, "question": question}), 16) >> 1
    return torch.Generator().manual_seed(seed)


def choose(logits_RV: Tensor, generators: Sequence[torch.Generator], recipe: AnswerRecipe) -> list[int | None]:
    """The next token of each row: the likeliest, or drawn from the smallest set that holds `top_p` of the probability.

    Sampling is of softmax(logits / temperature), by one uniform number a row from its own generator. None stands for
    rows whose logits overflowed to NaN.
    """
    most_R, chosen_R = logits_RV.max(dim=1)
    if recipe.temperature:
        chosen_R = _sample(logits_RV.nan_to_num(), generators, recipe)
    return [None if token < 0 else token for token in chosen_R.masked_fill(most_R.isnan(), -1).tolist()]


def _sample(logits_RV: Tensor, generators: Sequence[torch.Generator], recipe: AnswerRecipe) -> Tensor:
    probs_RV, ids_RV = (logits_RV.float() / recipe.temperature).softmax(dim=1).sort(dim=1, descending=True)
    up_to_RV = probs_RV.cumsum(dim=1)
    is_kept_RV = up_to_RV - probs_RV < recipe.top_p  # what is likelier than each; the first always stays
    is_kept_RV[:, 0] = True
    kept_R = (probs_RV * is_kept_RV).sum(dim=1)
    drawn_R = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(kept_R.device)
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


def likelihoods(logits_WV: Tensor, wanted: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
    """Log-likelihoods of some sequences of ids.

    Args:
        logits_WV: what follows each of some tokens.
        wanted: for each sequence the row of its first id's logits, the others following, and the ids.
    """
    rows = [first + i for first, ids in wanted for i in range(len(ids))]
    ids = [i for _, sequence in wanted for i in sequence]
    logp = iter(logits_WV.float().log_softmax(dim=1)[rows, ids].tolist())
    return [sum(next(logp) for _ in sequence) for _, sequence in wanted]
