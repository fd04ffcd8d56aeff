import psutil
import torch

from longvlm.pipeline.engine import kv_budget as memory
from longvlm.pipeline.engine.kv_budget import kv_budget

CPU = torch.device("cpu")


def test_it_is_a_share_of_what_is_free_now():
    budget = kv_budget(CPU)
    assert 0 < budget < psutil.virtual_memory().total
    assert kv_budget(CPU, 1000) == 1000
    assert kv_budget(CPU, 1 << 60) < psutil.virtual_memory().total


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert kv_budget(CPU) == 200_000
    (tmp_path / "memory.max").write_text("max\n")
    assert kv_budget(CPU) > 1_000_000
