"""What the tests share."""

from pathlib import Path

import pytest

from support import GOLDENS, VIDEOS


@pytest.fixture(scope="session")
def goldens() -> Path:
    if not GOLDENS.is_dir():
        pytest.skip(f"no reference outputs in {GOLDENS}; set LONGVLM_GOLDENS")
    return GOLDENS


@pytest.fixture(scope="session")
def videos() -> Path:
    if not VIDEOS.is_dir():
        pytest.skip(f"no clips in {VIDEOS}; set LONGVLM_VIDEOS")
    return VIDEOS
