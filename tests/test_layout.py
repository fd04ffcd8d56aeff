"""The rules of the house that a machine can hold: who may import whom, how long a file may grow, how quick help is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

ROOMS = ("schemas", "pipeline", "tinyworld", "jobs")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]

# What a room may import of the project, longest prefix first.
MAY_IMPORT = {
    "schemas": {"schemas"},
    "pipeline.ingest": {"schemas", "pipeline.ingest"},
    "pipeline.vision": {"schemas", "pipeline.vision", "pipeline.transfer"},
    "pipeline.store": {"schemas", "pipeline.store"},
    "pipeline.language": {"schemas", "pipeline.language", "pipeline.vision", "pipeline.transfer"},
    "pipeline": set(),
    "tinyworld": {"schemas", "pipeline", "tinyworld"},
    "jobs": {"schemas", "pipeline", "tinyworld", "jobs"},
}
# Libraries that a room must do without, so that it runs where they are not installed or costs little to start.
MUST_NOT_IMPORT = {
    "schemas": {"numpy", "torch", "transformers", "ray", "duckdb", "deltalake", "pandas", "fsspec"},
    "pipeline.ingest": {"torch", "transformers", "ray", "duckdb", "deltalake"},
    "pipeline.vision": {"ray", "duckdb", "deltalake", "decord", "av"},
    "pipeline.store": {"torch", "transformers", "ray"},
    "pipeline.language": {"ray", "duckdb", "deltalake", "decord", "av"},
    "tinyworld": {"ray", "duckdb", "deltalake"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rule_for(rules, module):
    return next(
        (rules[room] for room in sorted(rules, key=len, reverse=True) if f"{module}.".startswith(f"{room}.")), None
    )


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_only_point_left(path):
    module = module_of(path)
    allowed, forbidden = rule_for(MAY_IMPORT, module), rule_for(MUST_NOT_IMPORT, module) or set()
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top not in forbidden, f"{module} imports {name}"
        if top in {"schemas", "pipeline", "tinyworld", "jobs", "tests", "benchmarks"}:
            assert any(f"{name}.".startswith(f"{room}.") for room in allowed), f"{module} imports {name}"


def test_schemas_need_only_pyarrow():
    outside = {name.split(".")[0] for path in (ROOT / "schemas").glob("*.py") for name in imports_of(path)}
    assert outside - set(sys.stdlib_module_names) <= {"pyarrow", "schemas"}


@pytest.mark.parametrize("path", [*SOURCES, *(ROOT / "tests").rglob("*.py")], ids=lambda path: path.name)
def test_files_and_functions_stay_small(path):
    cap = 500 if "tests" in path.relative_to(ROOT).parts else 350
    assert len(path.read_text().splitlines()) <= cap
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno} lines"


def test_help_imports_nothing_heavy():
    code = "import sys, jobs.cli\ntry: jobs.cli.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "transformers", "duckdb", "deltalake", "pyarrow", "numpy", "pandas"} & set(loaded)
