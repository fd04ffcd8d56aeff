"""The generated parts of the documents, written anew: `make docs`, or `python docs/generate.py`.

A part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; what is around it is written by hand.
"""

import math
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args

import click

from longvlm.jobs.cli import main
from longvlm.jobs.cluster import metrics
from longvlm.jobs.commands import Command
from longvlm.jobs.index.forecast import segment_bytes_of
from longvlm.jobs.operate.alerts import read_alerts
from longvlm.pipeline.decode.scaling import fitted
from longvlm.pipeline.models.longvlm.checkpoint import NUM_GLOBAL_TOKENS
from longvlm.pipeline.models.qwen3_vl.checkpoint import QwenCheckpoint
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.models.smolvlm.checkpoint import SmolCheckpoint
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.vision.towers.qwen3_vl import DEFAULT_GRID
from longvlm.schemas.recipe import TokenDtype, channel_bytes, long
from longvlm.schemas.tables import TABLES
from longvlm.schemas.tower import TowerSpec

HERE = Path(__file__).parent
DICTIONARY: dict[str, Any] = tomllib.loads((HERE / "dictionary.toml").read_text())
HELPERS = ("live_videos", "failed_videos", "newest_rows", "deletions", "active_recipe")  # what other views stand on

# Towers and prompts of checkpoints that people run, as their configs say, with the longest prompt of each.
CLIP_L = TowerSpec("", "", 24, (16, 16), 1024, 224, has_cls=True, search_dim=None)
SIGLIP = TowerSpec("", "", 27, (27, 27), 1152, 384, has_cls=False, search_dim=None)
MERGER = TowerSpec(
    *("", "", 0, DEFAULT_GRID, 4 * 2048, (DEFAULT_GRID[0] * 32, DEFAULT_GRID[1] * 32)),
    has_cls=False,
    search_dim=None,
    frames_per_picture=2,
    num_streams=4,
    aspect="letterbox",
    has_positions=True,
)
CONNECTOR = TowerSpec("", "", 0, (8, 8), 960, 512, has_cls=False, search_dim=None, has_positions=True)
PLAIN, TIMES, FRAME_TIMES = (
    Sight("", -2, 0),
    Sight("", -1, 0, QwenCheckpoint.num_text_tokens),
    Sight("", -1, 0, SmolCheckpoint.num_text_tokens),
)
CHECKPOINTS = {
    "LongVLM over CLIP-L/14": (CLIP_L, Sight("", -2, NUM_GLOBAL_TOKENS), 2048),
    "LLaVA-1.5 7B, 13B": (replace(CLIP_L, patch_grid=(24, 24), image_size=336), PLAIN, 4096),
    "LLaVA-OneVision 7B": (SIGLIP, PLAIN, 32_768),
    "Qwen3-VL 2B": (MERGER, TIMES, 262_144),
    "Qwen3-VL 4B": (replace(MERGER, dim=4 * 2560), TIMES, 262_144),
    "Qwen3-VL 8B": (replace(MERGER, dim=4 * 4096), TIMES, 262_144),
    "SmolVLM2 500M": (CONNECTOR, FRAME_TIMES, 8192),
    "SmolVLM2 2.2B": (replace(CONNECTOR, patch_grid=(9, 9), dim=2048, image_size=384), FRAME_TIMES, 8192),
}
SHAPES = {"16:9": ((9, 16), (9, 16)), "4:3": ((3, 4), (9, 12)), "9:16": ((16, 9), (16, 9)), "1:1": ((1, 1), (12, 12))}

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


def costs() -> str:
    """What an hour of video costs under the default recipe, by family."""
    lines = [
        "| model | frames | of 10 s unmerged | a token | an hour | a token as int8 | an hour | prompt | context |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (tower, sight, context) in CHECKPOINTS.items():
        recipe = replace(long(tower), num_global_layers=sight.num_global_tokens)
        assert recipe.segment_s is not None
        num_segments = 3600 / recipe.segment_s
        rows = sight.num_global_tokens + num_segments * (recipe.tokens_per_segment + sight.num_marker_tokens)
        height, width = tower.frame_size
        stored = [
            said
            for dtype in get_args(TokenDtype)
            for said in (
                f"{channel_bytes(tower.dim, dtype) / 1024:.2f} KiB",
                f"{num_segments * segment_bytes_of(replace(recipe, dtype=dtype)) / 1e9:.2f} GB",
            )
        ]
        cells = (
            name,
            f"{height} x {width}",
            f"{recipe.patches_per_segment:,}",
            *stored,
            f"{rows:,.0f}",
            f"{context:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grids() -> str:
    """How much of a letterboxed frame is black in the default grid, and in one of the video's own shape."""
    lines = [
        "| video | black in the default grid | a grid of its shape | tokens a pair of frames |",
        "|---|---|---|---|",
    ]
    for name, (shape, grid) in SHAPES.items():
        black = [1 - math.prod(fitted(shape, size)) / math.prod(size) for size in (MERGER.frame_size, grid)]
        assert not black[1]
        lines.append(f"| {name} | {black[0]:.0%} | `[{grid[0]}, {grid[1]}]` | {math.prod(grid)} |")
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[], str]] = {
    "tables": tables,
    "views": lambda: _views(lambda name: name not in HELPERS),
    "helpers": lambda: _views(lambda name: name in HELPERS),
    "commands": commands,
    "metrics": series,
    "alerts": alerts,
    "costs": costs,
    "grids": grids,
}

if __name__ == "__main__":
    for document, text in documents().items():
        document.write_text(text)
