"""The generated parts of the documents, written anew: `make docs`, or `python docs/generate.py`.

A part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; what is around it is written by hand.
"""

import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click

from longvlm.jobs.cli import main
from longvlm.jobs.cluster import metrics
from longvlm.jobs.commands import Command
from longvlm.jobs.operate.alerts import read_alerts
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.tables import TABLES

HERE = Path(__file__).parent
DICTIONARY: dict[str, Any] = tomllib.loads((HERE / "dictionary.toml").read_text())
HELPERS = ("live_videos", "failed_videos", "newest_rows", "deletions", "active_recipe")  # what other views stand on

_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def documents() -> dict[Path, str]:
    """Every document with generated parts, as it should be."""
    found = {}
    for path in sorted(HERE.glob("*.md")):
        text = path.read_text()
        if _PART.search(text):
            found[path] = _PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}{part[3]}", text)
    return found


def tables() -> str:
    """The tables of a store, with Arrow's types."""
    columns = {name: [(field.name, str(field.type)) for field in schema] for name, schema in TABLES.items()}
    return "".join(_relation(name, DICTIONARY["tables"], found) for name, found in columns.items())


def views() -> dict[str, list[tuple[str, str]]]:
    """The columns of every view, with DuckDB's types: name -> (column, type)."""
    with catalog.connect(Snapshot()) as con:
        names = [name for (name,) in con.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()]
        shown = [name for name in names if not name.startswith("ledger_")]
        return {name: [row[:2] for row in con.execute(f"DESCRIBE {name}").fetchall()] for name in shown}


def _views(which: Callable[[str], bool]) -> str:
    found = views()
    names = [name for name in DICTIONARY["views"] if which(name)]
    return "".join(_relation(name, DICTIONARY["views"], found[name]) for name in names)


def meaning(relation: dict[str, Any], column: str) -> dict[str, str]:
    """What the dictionary says of a column: in its own relation, or else in the table that this is a view of.

    Raises:
        KeyError: it says nothing.
    """
    own: dict[str, dict[str, str]] = relation.get("columns", {})
    return own[column] if column in own else DICTIONARY["tables"][relation["of"]]["columns"][column]


def _relation(name: str, relations: dict[str, Any], columns: list[tuple[str, str]]) -> str:
    about = textwrap.fill(relations[name]["about"], 120, break_long_words=False, break_on_hyphens=False)
    lines = [f"\n### {name}\n", about, "", "| column | type | what it is | unit | null |"]
    lines.append("|---|---|---|---|---|")
    for column, kind in columns:
        said = meaning(relations[name], column)
        cells = (f"`{column}`", _short(kind), said["is"], said.get("unit", ""), said.get("null", "never"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _short(kind: str) -> str:
    """A type as a reader knows it: names that Arrow gives to the items of lists are left out."""
    return kind.replace("<element: ", "<").replace("<item: ", "<")


def commands() -> str:
    """Every command: how it is called, what it does, its arguments and options."""
    return "".join(_command(" ".join(words), command) for words, command in _leaves(main, ("longvlm",)))


def _leaves(group: click.Group, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _leaves(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, terminal_width=10_000)
    usage = command.get_usage(context).removeprefix("Usage: ")
    records = [record for option in command.params if (record := option.get_help_record(context)) and record[1]]
    lines = [
        f"\n## {name}\n",
        f"    {usage}\n",
        cleandoc(command.help or ""),
        "",
        "| option | what it says |",
        "|---|---|",
    ]
    lines += [f"| `{_cell(option)}` | {_cell(said)} |" for option, said in records]
    if isinstance(command, Command):
        lines += ["", *(f"    {example}" for example in command.examples)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def series() -> str:
    """The metrics, under the names that Prometheus knows them by."""
    lines = ["| metric | kind | by | what it counts |", "|---|---|---|---|"]
    for metric in metrics.ALL:
        name = metric.series[0].removesuffix("_bucket")
        by = ", ".join(f"`{tag}`" for tag in metric.tags)
        lines.append(f"| `{name}` | {metric.kind} | {by} | {metric.meaning} |")
    return "\n".join(lines) + "\n"


def alerts() -> str:
    """The alerts that come with the project, by name."""
    return "".join(f"* {query.name}\n" for query in read_alerts(None))


PARTS: dict[str, Callable[[], str]] = {
    "tables": tables,
    "views": lambda: _views(lambda name: name not in HELPERS),
    "helpers": lambda: _views(lambda name: name in HELPERS),
    "commands": commands,
    "metrics": series,
    "alerts": alerts,
}

if __name__ == "__main__":
    for document, text in documents().items():
        document.write_text(text)
