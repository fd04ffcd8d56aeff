import re
import shlex

import click
import pytest
from documents import shell_commands
from manifests import INFRA

from longvlm.jobs.cli import main
from support import ROOT

DOCKERFILE = (INFRA / "Dockerfile").read_text()
INSTRUCTIONS = [
    line
    for line in re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    if line.strip()
]
README = (INFRA / "README.md").read_text()
COMMANDS = [line for line in shell_commands(README) if line.startswith("longvlm ")]


def test_both_targets_are_there_and_run_as_nobody_special():
    stages = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    assert stages["cpu"] == stages["cuda"] == "runtime"  # one Python for all nodes of a cluster
    runtime = DOCKERFILE.split("AS runtime")[1]
    assert re.search(r"^USER 1000:1000$", runtime, re.MULTILINE)
    assert "USER root" not in DOCKERFILE


def test_what_it_copies_exists_and_is_let_through():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        word
        for line in INSTRUCTIONS
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert set(copied) == set(kept)  # and nothing else gets into a build


def test_every_room_of_the_project_is_in_the_image():
    assert all(
        f"COPY {room} ./{room}" in DOCKERFILE for room in ("longvlm", "schemas", "pipeline", "tinyworld", "jobs")
    )


def test_versions_are_pinned_and_no_secret_or_index_is_named():
    installs = [line for line in INSTRUCTIONS if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    assert not re.search(r"https?://(?!registry\.example)", DOCKERFILE)
    assert not re.search(r"(?i)password|secret|token=", " ".join(INSTRUCTIONS))
    assert re.search(r"^ARG PYTHON=python:3\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_guides_commands_exist(command):
    _, name, *words = shlex.split(command)
    try:
        main.commands[name].make_context(name, words)
    except click.UsageError as error:
        pytest.fail(f"{command}: {error.format_message()}")


def test_the_guide_names_files_that_exist():
    assert COMMANDS
    for path in re.findall(r"(?:-f|-k) (infra[\w/.-]*)", README):
        assert (ROOT / path).exists(), path
    listed = README.split("```")[1]
    for line in listed.strip().splitlines():
        assert (INFRA / line.split()[0]).exists(), line
        assert len(line.split()) <= 11


def test_the_guide_says_the_same_tags_as_the_manifests():
    tags = set(re.findall(r"registry\.example\.com/longvlm-index:\S+-(?:cpu|cuda)", README + DOCKERFILE))
    manifest = (INFRA / "rayjob-index.yaml").read_text()
    assert all(tag in manifest for tag in tags)
    assert len(tags) == 2
