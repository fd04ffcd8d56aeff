"""Where the tests find what lies outside the project, and the cases they discover there."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(os.environ.get("LONGVLM_GOLDENS", ROOT.parent / "shared" / "goldens"))
VIDEOS = Path(os.environ.get("LONGVLM_VIDEOS", ROOT.parent / "shared" / "videos"))


def cases(folder: Path, pattern: str) -> list[object]:
    """Pytest parameters for what a folder holds; one skipped case with a reason where it holds nothing."""
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    if not found:
        reason = f"no {pattern} in {folder}"
        return [pytest.param(None, id=pattern, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.name) for path in found]
