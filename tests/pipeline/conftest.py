"""An untrained model, and the reference's outputs as cases discovered in the goldens folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.pipeline.models.longvlm.model import LongVLM, load_longvlm
from longvlm.pipeline.models.prompt import PATCH
from models import LLAVAS, save_llava
from support import GOLDENS

TOWER_DIM = 64


@dataclass(frozen=True)
class Golden:
    """A folder of the reference's outputs: full/, base/, mm_projector.*, golden.json, golden.npz."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "golden.json").read_text())

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "golden.npz") as arrays:
            return dict(arrays)

    @cached_property
    def models(self) -> dict[str, LongVLM]:
        """The same model, loaded in both of the reference's layouts."""
        projector = next(self.folder.glob("mm_projector.*"))
        return {
            "full": load_longvlm(str(self.folder / "full")),
            "base": load_longvlm(str(self.folder / "base"), projector=str(projector)),
        }


@dataclass(frozen=True)
class Record:
    """One prompt of a golden and what the reference made of it."""

    golden: Golden
    index: int

    @property
    def about(self) -> dict[str, Any]:
        return self.golden.about["records"][self.index]

    def array(self, name: str) -> np.ndarray:
        return self.golden.arrays[f"{self.about['key']}_{name}"]

    @property
    def use_start_end(self) -> bool:
        return self.about.get("use_vid_start_end", True)

    @property
    def prompt(self) -> str:
        return self.about["prompt"].replace("{PATCHES}", PATCH * self.about["video_token_len"])

    @property
    def prefix(self) -> torch.Tensor:
        local, memory = self.golden.arrays["local"], self.golden.arrays["memory"]
        num_memory = self.about["video_token_len"] - len(local)
        return torch.from_numpy(np.concatenate([memory[len(memory) - num_memory :], local]))


def discover() -> list[Golden]:
    folders = sorted(path.parent for path in GOLDENS.glob("*/golden.json") if (path.parent / "full").is_dir())
    return [golden for golden in map(Golden, folders) if "conversation" in golden.about]


def pytest_generate_tests(metafunc):
    found = discover() if {"golden", "record"} & set(metafunc.fixturenames) else []
    nothing = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=f"no LongVLM outputs in {GOLDENS}"))]
    if "golden" in metafunc.fixturenames:
        cases = [pytest.param(golden, id=golden.folder.name) for golden in found]
        metafunc.parametrize("golden", cases or nothing)
    if "record" in metafunc.fixturenames:
        cases = [
            pytest.param(Record(golden, index), id=f"{golden.folder.name}-{about['key']}")
            for golden in found
            for index, about in enumerate(golden.about["records"])
        ]
        metafunc.parametrize("record", cases or nothing)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small only lose by a second thread, tenfold where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def untrained_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    (folder / "tower").mkdir()
    build_untrained(folder, "tower", TOWER_DIM)
    return folder


@pytest.fixture(scope="session")
def untrained(untrained_folder) -> LongVLM:
    return load_longvlm(str(untrained_folder))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A small random checkpoint of each LLaVA family; tests that change one take a copy."""
    return {family: save_llava(tmp_path_factory.mktemp("llavas") / family, family) for family in LLAVAS}


@pytest.fixture(params=list(LLAVAS))
def folder(request, folders) -> Path:
    """Each of them in turn."""
    return folders[request.param]
