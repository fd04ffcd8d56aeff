"""Where the tests find what lies outside the project, and the cases they discover there."""

import copy
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELPERS = Path(__file__).resolve().parent
GOLDENS = Path(os.environ.get("LONGVLM_GOLDENS", ROOT.parent / "shared" / "goldens"))
VIDEOS = Path(os.environ.get("LONGVLM_VIDEOS", ROOT.parent / "shared" / "videos"))


def cases(folder: Path, pattern: str) -> list[object]:
    """Pytest parameters for what a folder holds; one skipped case with a reason where it holds nothing."""
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if not found:
        reason = f"no {pattern} in {folder}"
        return [pytest.param(None, id=pattern, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.name) for path in found]


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
