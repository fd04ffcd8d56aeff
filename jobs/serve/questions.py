"""What pages say of a question over all videos: its answers in some order, and how they are spread."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from longvlm.jobs.serve.pinned import PinnedStore, Row

PAGE_ANSWERS = 100
MAX_PAGE = 100  # later ones are for the page SQL
_BINS = 20
_BARS = 24
SORTS = {
    "confidence": "confidence DESC NULLS LAST",
    "unsure": "confidence ASC NULLS LAST",
    "value": "value_number DESC NULLS LAST, value",
    "name": "uri",
}


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram."""

    label: str
    number: int
    share: float  # of the longest
    value: str | None = None  # of all answers that it counts; None for a bin of numbers


def answers_to(pinned: PinnedStore, question_hash: str, sort: str, value: str, page: int) -> list[Row]:
    """Answers to a question over all live videos, best first, one more than a page shows where there are more.

    Args:
        pinned: the store.
        question_hash: which question.
        sort: one of SORTS.
        value: only answers with this value, or text; empty: all.
        page: counted from 0.

    Raises:
        QueryError: it takes too long.
    """
    return pinned.rows(
        "SELECT write_id, uri, external_id, question_id, question, question_hash, answer_recipe, answer, value, "
        "confidence, status, error, model, num_visual_tokens, evidence, TRY_CAST(value AS DOUBLE) AS value_number "
        "FROM answers WHERE question_hash = $question_hash AND ($value = '' OR coalesce(value, answer) = $value) "
        f"ORDER BY {SORTS[sort]}, uri, write_id, answer_recipe LIMIT {PAGE_ANSWERS + 1} OFFSET {PAGE_ANSWERS * page}",
        {"question_hash": question_hash, "value": value},
        PAGE_ANSWERS + 1,
    )


def histogram(pinned: PinnedStore, question_hash: str, kind: str) -> list[Bar]:
    """How the answers to a question are spread: bins of numbers, or the most frequent values."""
    values: dict[str, Any] = {"question_hash": question_hash}
    if kind == "number":
        rows = pinned.rows(
            "SELECT TRY_CAST(value AS DOUBLE) AS number FROM answers WHERE question_hash = $question_hash "
            "AND isfinite(TRY_CAST(value AS DOUBLE)) LIMIT 1000000",
            values,
        )
        return _bins([row["number"] for row in rows])
    rows = pinned.rows(
        "SELECT coalesce(value, answer) AS value, count(*) AS number FROM answers "
        "WHERE question_hash = $question_hash AND coalesce(value, answer) IS NOT NULL "
        f"GROUP BY ALL ORDER BY number DESC, value LIMIT {_BARS}",
        values,
    )
    most = max((row["number"] for row in rows), default=1)
    return [Bar(row["value"], row["number"], row["number"] / most, row["value"]) for row in rows]


def _bins(numbers: list[float]) -> list[Bar]:
    if not numbers:
        return []
    low, high = min(numbers), max(numbers)
    if low == high:
        return [Bar(f"{low:g}", len(numbers), 1.0)]
    num_bins = min(_BINS, max(2, len(set(numbers))))
    width = (high - low) / num_bins
    if not math.isfinite(width) or width == 0:
        return [Bar(f"{low:g} to {high:g}", len(numbers), 1.0)]
    counted = Counter(min(int((number - low) / width), num_bins - 1) for number in numbers)
    most = max(counted.values())
    edges = [low + place * width for place in range(num_bins + 1)]
    return [
        Bar(f"{edges[place]:g} to {edges[place + 1]:g}", counted[place], counted[place] / most)
        for place in range(num_bins)
    ]
