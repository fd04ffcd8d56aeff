"""What no source of this project may do, whoever edits it: read from the sources' syntax."""

import ast
from collections.abc import Iterator

import pytest

from support import ROOT

PRODUCT = sorted(path for room in ("schemas", "pipeline", "jobs") for path in (ROOT / room).rglob("*.py"))
SOURCES = [*PRODUCT, *sorted((ROOT / "benchmarks").rglob("*.py"))]
# What runs code out of the data that it reads. Only the error's name may come from pickle.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "os.spawnl", "os.spawnv", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pandas.read_pickle", "pd.read_pickle", "torch.hub.load", "yaml.load",
    "yaml.unsafe_load", "asyncio.create_subprocess_shell",
}  # fmt: skip


def name_of(node: ast.expr) -> str:
    """`torch.load` for the expression that says so; empty for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(code: str) -> Iterator[str]:
    """What is unsafe in a source, for each place."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
            yield from (f"from {node.module}" for alias in node.names if alias.name != "UnpicklingError")
        elif isinstance(node, ast.Call):
            yield from faults_of_call(node)


def faults_of_call(node: ast.Call) -> Iterator[str]:
    name = name_of(node.func)
    said = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in UNSAFE_CALLS:
        yield name
    if "shell" in said and not is_literal(said["shell"], value=False):
        yield "shell"
    if "trust_remote_code" in said and not is_literal(said["trust_remote_code"], value=False):
        yield "trust_remote_code"
    if "allow_pickle" in said and not is_literal(said["allow_pickle"], value=False):
        yield "allow_pickle"
    if name.endswith("torch.load") and not is_literal(said.get("weights_only"), value=True):
        yield "torch.load without weights_only"


def is_literal(node: ast.expr | None, *, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert list(faults(path.read_text())) == []


def test_benchmarks_have_no_shell_and_load_no_pickles():
    """One of them writes pickles, because what it stands for did."""
    for path in SOURCES:
        assert set(faults(path.read_text())) <= {"import pickle"}, path
        assert "pickle.load" not in path.read_text(), path


def test_programs_are_given_as_lists():
    """What is started is named in the source, argument by argument: a string would be taken apart by somebody."""
    starters = {"subprocess.run", "subprocess.Popen", "subprocess.check_call", "subprocess.check_output"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name_of(node.func) in starters:
                assert not isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp), (path, node.lineno)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "run(command, shell=wanted)",
        "import os\nos.system('ls')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_is_for(code):
    assert list(faults(code))


def test_the_search_lets_pass_what_is_safe():
    safe = (
        "from pickle import UnpicklingError\ntorch.load(p, weights_only=True)\nmodel.eval()\nf(trust_remote_code=False)"
    )
    assert list(faults(safe)) == []
