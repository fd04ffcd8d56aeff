"""Help, --quiet, and what comes first."""

import json
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from longvlm.jobs.cli import COMMANDS, main
from longvlm.jobs.commands import GROUPS, Command, refuse_repeated
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.errors import InputError


def leaves(group=main, prefix=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*prefix, name))
        else:
            yield pytest.param((*prefix, name), command, id=" ".join((*prefix, name)))


LEAVES = list(leaves())


def options(command):
    return {param.name for param in command.params if isinstance(param, click.Option)}


def shown_help(*words):
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize(("words", "command"), LEAVES)
def test_help_is_grouped_has_two_examples_and_cuts_nothing(words, command):
    assert isinstance(command, Command)
    said = shown_help(*words)
    assert "..." not in re.sub(r"\w[,|]\.\.\.", "", said.partition("\n\n")[2])  # metavars and the usage say it
    assert "Options:" not in said
    sections = re.findall(r"^([A-Z][\w ]+):$", said, re.MULTILINE)
    assert set(sections) <= {*GROUPS, "Examples"}
    assert sections[-2:] == ["Output", "Examples"]
    assert len(command.examples) >= 2
    for example in command.examples:
        assert f"  {example}\n" in said
        program, *rest = shlex.split(example)
        assert (program, tuple(rest[: len(words)])) == ("longvlm", words)
        command.make_context(words[-1], rest[len(words) :])


def test_every_command_stands_in_the_help_once_with_all_of_its_first_paragraph():
    assert sorted(" ".join(COMMANDS.values()).split()) == sorted(main.commands)
    said = " ".join(shown_help().partition("\n\n")[2].split())
    for words in ("Watch the videos of SOURCE (a folder, bucket prefix or manifest) once and keep", "LONGVLM_STORE"):
        assert words in said
    assert "..." not in said


def test_groups_name_options_that_there_are():
    named = {name for names in GROUPS.values() for name in names.split()}
    there = {name for leaf in LEAVES for name in options(leaf.values[1])}
    there |= {f"{leaf.values[0][-1]}.{name}" for leaf in LEAVES for name in options(leaf.values[1])}
    assert named - {"csv", "markdown", "line", "yes"} <= there


FIRST_WRITES = """
import json, os, sys
from longvlm.jobs import cli

HEAVY = "torch transformers ray duckdb deltalake pyarrow numpy pandas fsspec s3fs rich".split()

class Told:
    encoding = "utf-8"
    def isatty(self):
        return TERMINAL
    def fileno(self):
        raise OSError("no size")
    def flush(self):
        pass
    def write(self, text):
        loaded = [name for name in HEAVY if name in sys.modules]
        os.write(1, (json.dumps([words, text, loaded]) + chr(10)).encode())
        os._exit(0)

for words in COMMANDS:
    if not os.fork():
        sys.stderr = Told()
        cli.main(words, prog_name="longvlm")
    os.wait()
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_the_first_line_is_out_before_anything_heavy_is_loaded_or_a_bucket_touched(terminal):
    examples = [shlex.split(leaf.values[1].examples[1])[1:] for leaf in LEAVES]
    examples = [[word for word in words if word not in ("--json", "--quiet")] for words in examples]
    code = f"TERMINAL = {terminal}\nCOMMANDS = {examples}\n{FIRST_WRITES}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words for words, _, _ in told] == examples
    assert [(words, text, loaded) for words, text, loaded in told if loaded or "loading libraries" not in text] == []


def test_what_only_looks_at_a_store_plans_answers_or_has_them_judged_loads_no_torch(tmp_path):
    store = Store.create(str(tmp_path / "store")).uri
    commands = [["status"], ["status", "--runs"], ["recipe", "list"], ["sql", "SELECT 1"]]
    run = "".join(f"main({[*words, '--store', store]}, standalone_mode=False)\n" for words in commands)
    judged = "import longvlm.jobs.evaluate.run, longvlm.jobs.operate.nightly, longvlm.pipeline.judging.judge_http"
    code = f"import sys\nfrom longvlm.jobs.cli import main\n{run}{judged}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "ray"} & set(done.stdout.splitlines()[-1].split())


def test_planning_an_index_run_loads_neither_torch_nor_transformers(tmp_path, clips, model):
    """Of the model that comes along, and of one beside whose folder is a tower."""
    words = ["index", str(clips), "--store", str(tmp_path / "store"), "--dry-run", "--model"]
    run = "".join(
        f"main({[*words, kind]}, standalone_mode=False)\nprint(*sys.modules)\n" for kind in ("tinyworld", model)
    )
    code = f"import sys\nfrom longvlm.jobs.cli import main\n{run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = [{*line.split()} for line in done.stdout.splitlines() if " longvlm.jobs.cli " in line]
    assert [modules & {"torch", "transformers", "ray"} for modules in loaded] == [set()] * 2


def test_quiet_json_and_logs_for_machines_say_nothing_on_the_way(tmp_path, driver):
    store = Store.create(str(tmp_path / "store")).uri
    for words in (["--quiet"], ["--json"]):
        done = CliRunner().invoke(main, ["status", "--store", store, *words])
        assert (done.exit_code, done.stderr) == (0, "")
    with driver.context() as patch:
        patch.setenv("LONGVLM_LOG", "info")
        done = CliRunner().invoke(main, ["status", "--store", store])
        assert (done.exit_code, done.stderr) == (0, "")
    done = CliRunner().invoke(main, ["status", "--store", store])
    assert "reading the store" in done.stderr


def test_shells_complete():
    env = {"_LONGVLM_COMPLETE": "zsh_complete", "COMP_WORDS": "longvlm sta", "COMP_CWORD": "1"}
    done = CliRunner().invoke(main, [], prog_name="longvlm", env=env)
    assert "status" in done.output


# --- options that stand twice ---


OPTIONS = [
    pytest.param(words, option, id=f"{' '.join(words)} {option.opts[-1]}")
    for words, command in (leaf.values for leaf in LEAVES)
    for option in command.params
    if isinstance(option, click.Option)
]


@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_an_option_given_twice_is_a_list_or_refused(words, option):
    given = [option.opts[-1]] * 2 if option.is_flag else [f"{option.opts[-1]}=1", f"{option.opts[-1]}=2"]
    context = click.Context(main)
    if option.multiple or option.is_flag:
        refuse_repeated(context, main, [*words, *given])
    else:
        with pytest.raises(InputError, match=f"^{option.opts[-1]} is given more than once"):
            refuse_repeated(context, main, [*words, *given])


def test_what_may_be_repeated_says_so():
    lists = [
        option
        for _, command in (leaf.values for leaf in LEAVES)
        for option in command.params
        if getattr(option, "multiple", False)
    ]
    assert len(lists) > 8
    assert [option.opts[-1] for option in lists if "repea" not in option.help and option.help != "As for index."] == []


def test_options_that_set_the_same_exclude_each_other():
    with pytest.raises(InputError, match="--csv and --json exclude each other"):
        refuse_repeated(click.Context(main), main, ["sql", "--csv", "x", "--json"])


@pytest.mark.parametrize(
    "args",
    [
        ["submit", "index", "s", "--where", "a", "--where", "b"],  # the job's own, which are looked at by themselves
        ["index", "s", "--include", "a", "--include", "b", "--nonsense"],
        ["index", "--store"],
        ["recipe"],
        ["recipe", "nonsense"],
    ],
)
def test_what_else_is_wrong_is_left_to_parsing(args):
    refuse_repeated(click.Context(main), main, args)
