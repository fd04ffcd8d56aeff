"""What a person sees of a job: a bar while it runs, a short table when it ends."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from longvlm.jobs.figures import counted, listed, spell_bytes, spell_figure, spell_seconds
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
        if isinstance(count, dict):
            continue
        if count:
            label, said = spell_figure(name, count)
            is_number = not isinstance(count, str)
            table.add_row(label, Text(visible(said), justify="right" if is_number else "left"))
    console.print(table)
    for name, by_name in counts.items():
        if isinstance(by_name, dict) and by_name:
            _print_counts(console, name, by_name)
    if stages:
        _print_stages(console, stages, wall_s)


def _print_counts(console: Console, what: str, by_name: dict[str, int]) -> None:
    """A small table of counts by name, such as failures by code, the largest first."""
    table = Table(Column(Text(what.replace("_", " "))), Column(justify="right"), box=None)
    for name, number in sorted(by_name.items(), key=lambda item: -item[1]):
        table.add_row(Text(visible(name)), f"{number:,}")
    console.print(table)


def _print_stages(console: Console, stages: dict[str, dict[str, float]], wall_s: float) -> None:
    slowest = bottleneck(stages, wall_s)
    numbers = (Column(name, justify="right") for name in ("workers", "units", "busy", "CPU"))
    busy = Table("stage", *numbers, "", box=None)
    for name, stage in stages.items():
        mark = "<- sets the pace" if name == slowest else ""
        share = f"{100 * busy_share(stage, wall_s):.0f} %"
        units = (f"{int(stage['workers']):,}", f"{int(stage['done']):,}")
        busy.add_row(name, *units, share, spell_seconds(stage["cpu_s"]) if stage["cpu_s"] else "", mark)
    console.print(busy)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A query's result as a table; blobs are counted, not shown."""
    table = Table(box=None)
    for name in rows[0] if rows else ():
        table.add_column(Text(_cell(name)))
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))  # as it is: brackets are no markup
    console = terminal()
    console.print(table)
    console.print(counted(len(rows), "row"), style="dim", highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else visible(str(value), keep="\n")


def print_estimate(counts: dict[str, Any]) -> None:
    """What a dry run found out: the counts, and how long it would take."""
    seconds, run_id = counts.pop("seconds"), counts.pop("rates_of_run")
    print_report("dry run: nothing was asked", counts, {}, 0.0)
    if run_id is None:
        said = "no run yet to estimate the time from; tokens to decode are the most there can be"
    else:
        said = f"about {spell_seconds(seconds)} at the rates of run {run_id}"
    terminal().print(said, highlight=False)


def print_status(status: dict[str, Any]) -> None:
    """What `longvlm status` knows: small tables, and the last run in a line."""
    console = terminal()
    table = Table(show_header=False, box=None)
    for name, number in status["videos"].items():
        table.add_row(f"videos {name}", Text(f"{number:,}", justify="right"))
    table.add_row("segments", Text(f"{status['segments']:,}", justify="right"))
    table.add_row("tokens", Text(spell_bytes(status["token_bytes"]), justify="right"))
    console.print(table)
    print_recipes(status["recipes"])
    if status["last_run"]:
        console.print("last run", style="bold")
        print_runs([status["last_run"]])
    for uri, why in status["damaged_files"].items():
        console.print(Text(f"damaged and left out: {visible(uri)} ({visible(why)})", style="red"))


def print_recipes(recipes: list[dict[str, Any]]) -> None:
    """The recipes of a store as `status.list_recipes` tells them."""
    table = Table("recipe", "fingerprint", "", "model", box=None)
    for stored in recipes:
        cells = (stored["name"], stored["recipe"], "shown" if stored["active"] else "", stored["model"])
        table.add_row(*(Text(visible(cell)) for cell in cells))
    terminal().print(table)


_NOT_COUNTS = ("wall_s", "run_id", "stopped", "questions", "workers", "prefill_tokens", "decode_tokens")


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Runs as `status.list_runs` tells them, a line each: when (UTC), job, id, how long, what came of it."""
    console = terminal()
    for run in runs:
        took = spell_seconds(run["wall_s"] or 0)
        outcome = f"stopped: {run['stopped']}; " if run["stopped"] else ""
        said = f"{run['finished_at']}  {run['job']:<8}  {run['run_id']}  {took:>13}  {outcome}{_counted(run['counts'])}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    if not runs:
        console.print("no runs yet", style="dim")


_NIGHT = ("index", "answer", "maintain", "alerts")  # the parts of a night, of which each is told


def _counted(counts: dict[str, Any]) -> str:
    """What is not nought: `indexed 3, failed 2 (truncated 2)`; of a nightly part by part, `index: ...; answer: ...`."""
    codes = listed(counts.get("failures", {}))
    told, parts = [], []
    for name, value in counts.items():
        if isinstance(value, dict) and name not in ("failures", "left_out", "by_kind", "num_by_kind"):
            if (said := _counted(value)) or name in _NIGHT:
                parts.append(f"{name.replace('_', ' ')}: {said or 'nothing'}")
        elif type(value) is int and value and name not in _NOT_COUNTS:  # not a bool
            told.append(f"{name.replace('_', ' ')} {value:,}" + (f" ({codes})" if codes and name == "failed" else ""))
    return "; ".join([*parts, *([", ".join(told)] if told else [])])
