"""An untrained model, and the reference's outputs as cases discovered in the goldens folder."""

from pathlib import Path

import pytest
import torch
from reference_outputs import golden_cases, record_cases

from longvlm.pipeline import chat_templates
from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.pipeline.models.longvlm.model import LongVLM, load_longvlm
from models import LLAVAS, save_llava

TOWER_DIM = 64


def pytest_generate_tests(metafunc):
    for name, found in (("golden", golden_cases), ("record", record_cases)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, found())


@pytest.fixture
def impatient(monkeypatch):
    """Chat templates are rendered as ever, but in a fifth of a second: what never gets done takes no longer."""
    renderer = chat_templates._Renderer(cpu_limit_s=0.2)
    monkeypatch.setattr(chat_templates, "_renderer", renderer)
    yield
    renderer.close()


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
