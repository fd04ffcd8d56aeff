"""Answers as a person reads them."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console

from longvlm.jobs.figures import short_names
from longvlm.jobs.terminal import terminal
from longvlm.pipeline.answering.evidence import describe

_WIDEST_NAME = 40  # characters; answers stand in a column behind names up to this


def print_answers(rows: Iterable[dict[str, Any]], *, evidence: bool = False) -> None:
    """Answers, or the reasons why there are none, by question where several videos are asked, else by video.

    Args:
        rows: of tables.ANSWERS.
        evidence: say the seconds that each leans on, too.
    """
    console, found = terminal(), list(rows)
    folder, names = short_names(dict.fromkeys(row["uri"] for row in found))
    if len(names) > 1:
        if folder:
            _print(console, f"videos in {folder}", style="dim")
        first = {question: place for place, question in reversed(list(enumerate(row["question"] for row in found)))}
        found.sort(key=lambda row: (first[row["question"]], row["uri"]))
        heads, others = "question", names
    else:
        heads, others = "uri", {}
    width = min(max(map(len, names.values()), default=0), _WIDEST_NAME)
    for head, of_head in groupby(found, key=lambda row: row[heads]):
        _print(console, head, style="bold")
        for row in of_head:
            about = others[row["uri"]] if others else row["question"]
            _print(console, f"  {about:<{width}}  {_said(row)}" if others else f"  {about}  {_said(row)}")
            if evidence and row["evidence"]:
                _print(console, f"  {'':<{width}}  {describe(row['evidence'])}", style="dim")


def _print(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _said(row: dict[str, Any]) -> str:
    if row["status"] == "failed":
        return f"failed ({row['error_code']}): {row['error']}"
    if row["status"] == "unparsed":
        return f"no {row['type']} to be read from: {row['answer']}"
    return row["answer"] if row["confidence"] is None else f"{row['answer']} ({100 * row['confidence']:.0f} %)"
