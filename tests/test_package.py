"""What is installed: one package, whole, under one name, whatever lies in the folder that it is used in."""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from support import ROOT, stray_folder

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = SETTINGS["tool"]["setuptools"]["package-dir"]


def installed_names():
    """Every file that an installation holds, by its path in there."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                yield str(Path(*package.split(".")) / path.relative_to(ROOT / folder))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left behind here."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """A folder that holds the package and nothing else; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("target")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*install, str(wheel)], check=True)
    return folder


def test_every_folder_is_listed():
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for folder in FOLDERS.values()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    listed = SETTINGS["tool"]["setuptools"]["packages"]
    assert {name.removeprefix("longvlm.") for name in listed} == found
    assert all(name.split(".")[0] == "longvlm" for name in listed)


def test_links_lead_where_the_package_is():
    links = ROOT / ".links" / "longvlm"
    for package, folder in FOLDERS.items():
        for path in [ROOT / folder] if package != "longvlm" else sorted((ROOT / folder).glob("*[.]*")):
            assert (links / path.name).resolve() == path.resolve()


def test_a_wheel_has_one_name_and_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {re.sub(r"-.*", "", name.split("/")[0]) for name in names} == {"longvlm", "longvlm_index"}
    held = {name for name in names if name.startswith("longvlm/")}
    assert held == set(installed_names())
    for name in ("py.typed", "schemas/views.sql", "pipeline/judging/judging.toml", "tinyworld/model/model.safetensors"):
        assert f"longvlm/{name}" in held


def import_all(folder, said):
    """Import an installation in a folder, in a process that shall know of the project nothing but that."""
    sys.path[:] = [str(folder), *(path for path in sys.path if "/lib/python" in path)]
    for name, module in [*sys.modules.items()]:
        path = getattr(module, "__file__", None) or ""
        if path.startswith(f"{ROOT}{os.sep}") and "site-packages" not in path:  # where its own environment may lie
            del sys.modules[name]
    os.chdir(folder.parent)
    try:
        package = importlib.import_module("longvlm")
        names = [found.name for found in pkgutil.walk_packages(package.__path__, "longvlm.")]
        said.send([importlib.import_module(name).__file__ for name in names])
    except BaseException as error:
        said.send(repr(error))
        raise


def test_an_installation_is_whole(target, tmp_path):
    context = get_context("fork")  # libraries, which take seconds to import, it has from here
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=import_all, args=(target, said))
    process.start()
    said.close()
    found = heard.recv()
    process.join()
    assert isinstance(found, list), found
    assert len(found) > 100
    assert all(Path(path).is_relative_to(target) for path in found)
    env = {**os.environ, "PYTHONPATH": str(target)}
    shown = subprocess.run(
        [sys.executable, str(target / "bin" / "longvlm"), "--help"],
        env=env, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Watch every video" in shown.stdout


def test_a_checkout_that_is_not_installed_works_by_its_links():
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([".links", *libraries])}
    code = "import benchmarks.plan, longvlm.jobs.cli, longvlm.pipeline.store.files as room; print(room.__file__)"
    command = [sys.executable, "-S", "-c", code]  # -S: what is installed here is not found
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == ROOT / ".links" / "longvlm" / "pipeline" / "store"


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "longvlm"], [sys.executable, "-I", "-m", "longvlm"]], ids=" ".join
)
def test_the_module_is_the_command_line_wherever_it_is_started(command, tmp_path):
    done = subprocess.run(
        [*command, "status", "--store", str(tmp_path / "none")],
        cwd=stray_folder(tmp_path / "own"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "longvlm"), done.stderr
    assert "stray" not in done.stdout + done.stderr
