"""Where the tests find what lies outside the project, and the cases they discover there."""

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).resolve().parent
GOLDENS = Path(os.environ.get("LONGVLM_GOLDENS", ROOT.parent / "shared" / "goldens"))
VIDEOS = Path(os.environ.get("LONGVLM_VIDEOS", ROOT.parent / "shared" / "videos"))
CRDS = Path(os.environ.get("LONGVLM_CRDS", ROOT.parent / "shared" / "crds"))
BROWSER = Path(os.environ.get("LONGVLM_BROWSER", "/usr/bin/chromium"))
LENT = {
    "goldens": GOLDENS,
    "videos": VIDEOS,
    "crds": CRDS,
    "browser": BROWSER,
}  # what may be missing, by its name in LONGVLM_FAIL_WITHOUT


def missing(folder: Path, what: str) -> NoReturn:
    """Skip a test for what is lent and lacks something, or fail it where LONGVLM_FAIL_WITHOUT names that."""
    name = next(name for name, lent in LENT.items() if folder.is_relative_to(lent))
    reason = f"no {what} in {folder}; set LONGVLM_{name.upper()}"
    if name in os.environ.get("LONGVLM_FAIL_WITHOUT", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


def lent(path: Path) -> Path:
    """A file or folder in one of the lent folders, which may lack it."""
    return path if path.exists() else missing(path.parent, path.name)


def parameters(found: Iterable[tuple[str, object]], folder: Path, what: str) -> list[object]:
    """Pytest parameters for the named things found in a lent folder; one case that is missing where there are none."""
    cases = [pytest.param(value, id=name) for name, value in found]
    return cases or [pytest.param(None, id=what.replace(" ", "-"), marks=pytest.mark.missing(folder, what))]


def cases(folder: Path, pattern: str) -> list[object]:
    """Pytest parameters for the files and folders in a lent folder whose names have a pattern."""
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    return parameters([(path.name, path) for path in found], folder, pattern)


def largest_error(found, wanted) -> float:
    """Between two tensors of one shape; infinite where they have not one shape."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted.double()).abs().max()) if found.numel() else 0.0


def moved(model, device):
    """A copy of a language model on a device."""
    model = copy.deepcopy(model)
    model.llm.to(device)
    model.projector.to(device)
    return model


STRAY_FOLDERS = ("jobs", "schemas", "pipeline", "tinyworld")
STRAY_MODULES = ("types", "random", "torch")


def stray_folder(folder: Path) -> Path:
    """A folder as somebody may have it, with Python of his own under names that others have too: importing it ends."""
    for name in STRAY_FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('a stray {name} was imported')\n")
    for name in STRAY_MODULES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('a stray {name} was imported')\n")
    return folder
