"""The rules of the house that a machine can hold: who may import whom, how large files and folders grow."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from support import ROOT

ROOMS = ("schemas", "pipeline", "tinyworld", "jobs")
SOURCES = [path for room in ("longvlm", *ROOMS) for path in sorted((ROOT / room).rglob("*.py"))]
BENCHMARKS, TESTS = sorted((ROOT / "benchmarks").rglob("*.py")), sorted((ROOT / "tests").rglob("*.py"))

FAMILIES = ("longvlm", "llava", "qwen3_vl", "smolvlm")
MODELS = {"pipeline.models", *(f"pipeline.models.{family}" for family in FAMILIES)}
VISION = {"pipeline.vision", "pipeline.vision.towers"}
PIPELINE = {
    "pipeline",
    "pipeline.source",
    "pipeline.decode",
    *VISION,
    "pipeline.store",
    "pipeline.store.query",
    "pipeline.store.upkeep",
}
PIPELINE |= MODELS | {"pipeline.engine", "pipeline.answering", "pipeline.training", "pipeline.judging"}
BELOW_JOBS = PIPELINE | {"tinyworld", "jobs"}

# What a room (a folder) may import of the project, besides itself and schemas. Files at the pipeline's root are a room.
MAY_IMPORT = {
    "longvlm": {"jobs", "jobs.index", "jobs.answer", "jobs.query", "jobs.serve"} | PIPELINE,
    "schemas": set(),
    "pipeline": set(),
    "pipeline.source": {"pipeline"},
    "pipeline.decode": {"pipeline", "pipeline.source"},
    "pipeline.vision": {"pipeline"} | VISION,
    "pipeline.vision.towers": {"pipeline", "pipeline.vision"},
    "pipeline.store": {"pipeline"},
    "pipeline.store.query": {"pipeline", "pipeline.store"},
    "pipeline.store.upkeep": {"pipeline", "pipeline.store"},
    "pipeline.models": {"pipeline"} | VISION | MODELS,
    **{f"pipeline.models.{family}": {"pipeline", "pipeline.models"} | VISION for family in FAMILIES},
    "pipeline.engine": {"pipeline"} | VISION | MODELS,
    "pipeline.answering": {"pipeline", "pipeline.engine"} | VISION | MODELS,
    "pipeline.training": {"pipeline"} | VISION | MODELS,
    "pipeline.judging": {"pipeline", "pipeline.engine", "pipeline.answering"} | VISION | MODELS,
    "tinyworld": PIPELINE,
    "jobs": BELOW_JOBS | {"jobs.cluster"},
    "jobs.cluster": PIPELINE,
    "jobs.index": BELOW_JOBS | {"jobs.cluster"},
    "jobs.answer": BELOW_JOBS | {"jobs.cluster", "jobs.index"},
    "jobs.train": BELOW_JOBS | {"jobs.cluster", "jobs.answer"},
    "jobs.evaluate": BELOW_JOBS | {"jobs.cluster", "jobs.index", "jobs.answer"},
    "jobs.compare": BELOW_JOBS | {"jobs.cluster", "jobs.index", "jobs.answer"},
    "jobs.operate": BELOW_JOBS | {"jobs.cluster", "jobs.index", "jobs.answer"},
    "jobs.query": BELOW_JOBS | {"jobs.cluster", "jobs.answer"},
    "jobs.serve": BELOW_JOBS | {"jobs.cluster", "jobs.answer", "jobs.query"},
}
KNOW_ALL_JOBS = {"jobs.cli", "jobs.demo"}  # of the files at the root of jobs/, which the rooms use
# Libraries that a room must do without, so that it runs where they are not installed or costs little to start.
MUST_NOT_IMPORT = {
    "schemas": {"numpy", "torch", "transformers", "ray", "duckdb", "deltalake", "pandas", "fsspec"},
    "pipeline": {"ray", "duckdb", "deltalake", "decord", "av"},
    "pipeline.source": {"torch", "transformers", "ray", "duckdb", "deltalake"},
    "pipeline.decode": {"torch", "transformers", "ray", "duckdb", "deltalake"},
    "pipeline.store": {"torch", "transformers", "ray"},
    "pipeline.store.query": {"torch", "transformers", "ray"},
    "pipeline.store.upkeep": {"torch", "transformers", "ray"},
    "tinyworld": {"ray", "duckdb", "deltalake"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in [*SOURCES, *BENCHMARKS]}


def room_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


@dataclass(frozen=True)
class Contents:
    """What the tests ask of a file, which is parsed once for all of them."""

    num_lines: int
    imports: frozenset[str]  # modules of the project by their folders, of others by their names
    classes: tuple[str, ...]  # that are not within others
    functions: tuple[tuple[str, int], ...]  # names, and how many lines each has
    families: frozenset[str]  # that it names, or whose kind it compares


@cache
def contents_of(path: Path) -> Contents:
    text = path.read_text()
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    return Contents(
        len(text.splitlines()),
        frozenset(name.removeprefix("longvlm.") for name in _imported(path, nodes)),
        tuple(node.name for node in tree.body if isinstance(node, ast.ClassDef)),
        tuple((node.name, node.end_lineno - node.lineno) for node in nodes if isinstance(node, ast.FunctionDef)),
        frozenset(_families_named(nodes)) if "family" in text or A_FAMILY.search(text) else frozenset(),
    )


def _imported(path: Path, nodes: list[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("longvlm.") in MODULES else node.module for name in names}
    bare = {name for name in found if name.split(".")[0] in ROOMS}
    assert not bare, f"{path} imports {bare}; what is installed is longvlm"
    return found


def imports_of(path: Path) -> frozenset[str]:
    return contents_of(path).imports


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name in MODULES}


def test_imports_only_point_left():
    for module in map(module_of, SOURCES):
        room, path = room_of(module), MODULES[module]
        allowed = MAY_IMPORT[room] | {room, "schemas"}
        for name in ours(path):
            if module not in KNOW_ALL_JOBS:
                assert room_of(name) in allowed, f"{module} imports {name}"
            if room != "longvlm":
                assert name != "jobs.cli", f"{module} imports the command line, which imports it"
        pipeline = {"ray", "duckdb", "deltalake", "decord", "av"} if room.startswith("pipeline.") else set()
        forbidden = MUST_NOT_IMPORT.get(room, set() if room.startswith(("jobs", "longvlm")) else pipeline)
        for name in imports_of(path):
            top = name.split(".")[0]
            assert top not in forbidden | {"tests", "benchmarks"}, f"{module} imports {name}"


@pytest.mark.parametrize("room", ["pipeline.source", "pipeline.decode"])
def test_a_decoders_child_loads_no_torch_by_way_of_others(room):
    waiting, seen = [name for name in MODULES if room_of(name) == room], set()
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            assert not {name.split(".")[0] for name in imports_of(MODULES[module])} & MUST_NOT_IMPORT[room], module
            waiting += ours(MODULES[module])


# What a family is called, where code would have to ask for it: sentences for people hold white space, and are none.
A_FAMILY = re.compile(r"qwen|smolvlm|llava", re.IGNORECASE)
KNOW_A_FAMILY = {"pipeline.models", "pipeline.vision.towers", *(f"pipeline.models.{family}" for family in FAMILIES)}
MAKE_ONE = {"tinyworld.calibrate", "tinyworld.make"}  # a LongVLM is what the tiny world's model is


def families_in(path: Path) -> set[str]:
    """The families that a file names or imports, or whose kind it compares."""
    of_one = r"pipeline\.(models\.(longvlm|llava|qwen3_vl|smolvlm)|vision\.towers\.(clip|qwen|smol))"
    contents = contents_of(path)
    return contents.families | {name for name in contents.imports if re.match(of_one, name)}


def _families_named(nodes: list[ast.AST]) -> set[str]:
    found = set()
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        said = [value for field in ("id", "attr", "arg", "name", "asname") if (value := getattr(node, field, None))]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            said = [node.value] if not re.search(r"\s", node.value) else []
        if isinstance(node, ast.Compare | ast.Match | ast.Subscript):
            asked = node.subject if isinstance(node, ast.Match) else node
            kinds = [part for part in ast.walk(asked) if isinstance(part, ast.Attribute) and part.attr == "family"]
            found |= {ast.unparse(kind) for kind in kinds}
        found |= {name for name in said if isinstance(name, str) and A_FAMILY.search(name)}
    return found


def test_only_families_know_what_they_are():
    named = {module: families_in(MODULES[module]) for module in map(module_of, SOURCES)}
    outside = {module: names for module, names in named.items() if names and room_of(module) not in KNOW_A_FAMILY}
    assert outside.keys() == MAKE_ONE, outside


@pytest.mark.parametrize(
    "code",
    [
        "from longvlm.pipeline.models.longvlm.model import LongVLM",
        "import longvlm.pipeline.vision.towers.smolvlm",
        "is_new = config['model_type'] == 'qwen3_vl'",
        "sizes = {'llava_onevision': 3}",
        "def load_qwen(): pass",
        "done = isinstance(model, QwenModel)",
        "done = spec.family in known",
        "done = by_family[spec.family]",
        "match spec.family:\n    case 'x': pass",
    ],
)
def test_a_branch_by_family_would_be_seen(tmp_path, code):
    (tmp_path / "a.py").write_text(code)
    assert families_in(tmp_path / "a.py")
    (tmp_path / "b.py").write_text("'of a Qwen3-VL'\nprint('or a LLaVA, such as llava-hf/x', spec.family)\n")
    assert not families_in(tmp_path / "b.py")


def test_nobody_knows_the_rooms_by_their_folders_names():
    for path in [*BENCHMARKS, *TESTS]:
        imports_of(path)


def test_no_files_import_one_another_in_a_circle():
    left = {module: ours(path) - {module} for module, path in MODULES.items()}
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left  # what a circle holds, and what needs it


def test_a_class_name_means_one_thing():
    found = defaultdict(list)
    for module, path in MODULES.items():
        for name in contents_of(path).classes:
            found[name].append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_folders_stay_small():
    folders = {path.parent for path in [*SOURCES, *BENCHMARKS, *TESTS]}
    sizes = {folder: len({*folder.glob("*.py")} - {folder / "__init__.py"}) for folder in folders}
    assert {str(folder.relative_to(ROOT)): size for folder, size in sizes.items() if size > 15} == {}


def test_a_store_asks_no_clock_but_its_own():
    asking = re.compile(r"\btime\.time(_ns)?\(|datetime\.now\(")
    files = [*(ROOT / "pipeline/store").rglob("*.py"), *(ROOT / "schemas").glob("*.py")]
    assert [path.name for path in files if asking.search(path.read_text())] == ["clock.py"]


def test_schemas_need_only_pyarrow():
    outside = {name.split(".")[0] for path in (ROOT / "schemas").glob("*.py") for name in imports_of(path)}
    assert outside - set(sys.stdlib_module_names) <= {"pyarrow", "schemas"}


def test_files_and_functions_stay_small():
    for path in [*SOURCES, *TESTS]:
        name, contents = path.relative_to(ROOT), contents_of(path)
        cap = 500 if "tests" in name.parts else 350
        assert contents.num_lines <= cap, f"{name} has {contents.num_lines} lines"
        for function, num_lines in contents.functions:
            assert num_lines < 60, f"{function} in {name} has {num_lines} lines"


def test_help_imports_nothing_heavy():
    code = "import sys, longvlm.jobs.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = "torch ray transformers duckdb deltalake pyarrow numpy pandas llguidance"
    assert not set(heavy.split()) & set(loaded)
