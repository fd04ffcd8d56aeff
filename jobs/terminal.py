"""What a person sees of a job: a bar while it runs, a short table when it ends."""

import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longvlm.pipeline.visible import visible
from longvlm.schemas.errors import InputError

NO_MATPLOTLIB = "there is no plot, because matplotlib is not installed: pip install 'longvlm-index[compare]'."


def bottleneck(stages: dict[str, dict[str, float]], wall_s: float) -> str | None:
    """The stage whose workers were busy for the largest share of the run."""
    return max(stages, key=lambda name: busy_share(stages[name], wall_s), default=None)


def busy_share(stage: dict[str, float], wall_s: float) -> float:
    """Busy seconds per worker and second of the run."""
    return stage["busy_s"] / (max(stage["workers"], 1) * max(wall_s, 1e-9))


def plot_folder(folder: Path, option: str) -> Path:
    """Make the folder that plots are to go to, before a run of hours; InputError, naming the option, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"nothing can be saved in {folder} ({error.strerror}); use another {option}.") from error
    return folder


class _Terminal(Console):
    """A console that obeys no codes but its own: those in names and messages are shown, and `:x:` is no picture."""

    def render_str(self, text: str, **options: Any) -> Text:
        """A text as the console shows it, by itself or in a cell of a table."""
        return super().render_str(visible(text, keep="\n"), **options)


def terminal() -> Console:
    """Standard output: as wide as the terminal, or as wide as a line needs where nobody looks (a pipe, a file)."""
    return _Terminal(width=None if sys.stdout.isatty() else 10_000, emoji=False)


def print_report(title: str, counts: dict[str, Any], stages: dict[str, dict[str, float]], wall_s: float) -> None:
    """The table at the end of a run: where everything went, how busy each stage was, and which one set the pace."""
    console = terminal()
    console.print(title, style="bold", markup=False, highlight=False)
    table = Table(show_header=False, box=None)
    for name, count in counts.items():
        if count:
            table.add_row(name.replace("_", " "), Text(visible(_listed(count))))
    console.print(table)
    if not stages:
        return
    slowest = bottleneck(stages, wall_s)
    busy = Table("stage", "workers", "units", "busy", "CPU s", box=None)
    for name, stage in stages.items():
        mark = "  <- sets the pace" if name == slowest else ""
        share = f"{100 * busy_share(stage, wall_s):.0f} %{mark}"
        busy.add_row(name, str(int(stage["workers"])), str(int(stage["done"])), share, f"{stage['cpu_s']:.1f}")
    console.print(busy)


def _listed(count: Any) -> str:
    """A count, or several by name: `truncated 2, not_a_video 1`."""
    return ", ".join(f"{name} {number}" for name, number in count.items()) if isinstance(count, dict) else str(count)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A query's result as a table; blobs are counted, not shown."""
    table = Table(box=None)
    for name in rows[0] if rows else ():
        table.add_column(Text(_cell(name)))
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))  # as it is: brackets are no markup
    console = terminal()
    console.print(table)
    console.print(f"{len(rows)} rows", style="dim", highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else visible(str(value), keep="\n")


def print_answers(rows: Iterable[dict[str, Any]], *, evidence: bool = False) -> None:
    """Each question with its answer or the reason why there is none, and with `evidence` the seconds it leans on."""
    from longvlm.pipeline.answering.evidence import describe  # it needs torch, and `longvlm status` does not

    console = terminal()
    for row in rows:
        console.print(f"{row['uri']}  {row['question']}", style="bold", markup=False, highlight=False)
        console.print(f"  {_said(row)}", markup=False, highlight=False)
        if evidence and row["evidence"]:
            console.print(f"  {describe(row['evidence'])}", style="dim", markup=False, highlight=False)


def _said(row: dict[str, Any]) -> str:
    if row["status"] == "failed":
        return f"failed ({row['error_code']}): {row['error']}"
    if row["status"] == "unparsed":
        return f"no {row['type']} to be read from: {row['answer']}"
    return row["answer"] if row["confidence"] is None else f"{row['answer']} ({100 * row['confidence']:.0f} %)"


def print_estimate(counts: dict[str, Any]) -> None:
    """What a dry run found out: the counts, and how long it would take."""
    seconds, run_id = counts.pop("seconds"), counts.pop("rates_of_run")
    print_report("dry run: nothing was asked", counts, {}, 0.0)
    if run_id is None:
        said = "no run yet to estimate the time from; tokens to decode are the most there can be"
    else:
        said = f"about {timedelta(seconds=round(seconds))} at the rates of run {run_id}"
    terminal().print(said, highlight=False)


def print_status(status: dict[str, Any]) -> None:
    """What `longvlm status` and `longvlm recipe list` know, a line each."""
    console = terminal()
    for name, value in status.items():
        for entry in value if isinstance(value, list) else [value]:
            said = ", ".join(f"{k} {_cell(v)}" for k, v in entry.items()) if isinstance(entry, dict) else _cell(entry)
            console.print(f"{name.replace('_', ' '):>12}  {said}", markup=False, highlight=False, soft_wrap=True)


_NOT_COUNTS = ("wall_s", "run_id", "stopped", "questions", "workers", "prefill_tokens", "decode_tokens")


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Runs as `status.list_runs` tells them, a line each: when (UTC), job, id, how long, what came of it."""
    console = terminal()
    for run in runs:
        took = timedelta(seconds=round(run["wall_s"] or 0))
        outcome = f"stopped: {run['stopped']}; " if run["stopped"] else ""
        said = (
            f"{run['finished_at']}  {run['job']:<8}  {run['run_id']}  {took!s:>8}  {outcome}{_counted(run['counts'])}"
        )
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if not runs:
        console.print("no runs yet", style="dim")


def _counted(counts: dict[str, Any]) -> str:
    """What is not nought: `indexed 3, failed 2 (truncated 2)`; of a nightly part by part, `index: ...; answer: ...`."""
    codes = ", ".join(f"{code} {number}" for code, number in counts.get("failures", {}).items())
    told, parts = [], []
    for name, value in counts.items():
        if isinstance(value, dict) and name not in ("failures", "left_out"):
            parts.append(f"{name}: {_counted(value) or 'nothing'}")
        elif type(value) is int and value and name not in _NOT_COUNTS:  # not a bool
            told.append(f"{name.replace('_', ' ')} {value}" + (f" ({codes})" if codes and name == "failed" else ""))
    return "; ".join([*parts, *([", ".join(told)] if told else [])])
