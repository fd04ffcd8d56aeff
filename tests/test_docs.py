"""What the documents say is true: commands exist, queries run, every folder of the tree is in the tree."""

import re

import pytest
from click.testing import CliRunner

from longvlm.jobs.cli import main
from support import ROOT

README = (ROOT / "README.md").read_text()
QUERIES = [query.strip() for query in README.split("```sql\n")[1].split("```")[0].split(";") if query.strip()]


def commands(group=main, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_explains_itself_and_stands_in_the_readme(command):
    shown = CliRunner().invoke(main, [*command, "--help"])
    assert shown.exit_code == 0
    assert len(shown.output.splitlines()) > 4
    assert f"longvlm {' '.join(command)}" in README


def test_the_tree_is_the_tree():
    listed, above = set(), []
    for line in README.split("## The tree")[1].split("## Vocabulary")[0].splitlines():
        if found := re.match(r"( *)(\w+)/ ", line):
            above = [*above[: len(found[1]) // 2], found[2]]
            listed.add("/".join(above))
    rooms = ("longvlm", "schemas", "pipeline", "tinyworld", "jobs")
    folders = {path.parent.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("__init__.py")}
    assert listed == {*map(str, folders), "infra", "docs", "benchmarks", "tests"}


def test_the_first_screen_is_a_screen():
    assert README.split("\n## ")[0].count("\n") <= 60


def test_there_are_five_queries():
    assert len(QUERIES) == 5
