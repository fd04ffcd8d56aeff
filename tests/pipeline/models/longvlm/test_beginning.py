import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvlm.pipeline.models.longvlm.init import begin, is_begun
from longvlm.pipeline.models.longvlm.model import EMBED, HEAD, PROJECT, PROJECT_BIAS, load_longvlm
from longvlm.schemas.errors import InputError
from models import save_clip_tower


@pytest.fixture
def base(untrained_folder, tmp_path):
    """A language model that never saw a video: no projector, and no rows for the video tokens."""
    folder = shutil.copytree(untrained_folder, tmp_path / "base")
    save_clip_tower(folder / "tower", text=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors[PROJECT], tensors[PROJECT_BIAS]
    tensors |= {name: tensors[name][:-3].clone() for name in (EMBED, HEAD)}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(tensors[EMBED])}))
    return folder


def test_a_bare_language_model_gets_a_projector_and_rows(base, untrained_folder, tmp_path):
    assert is_begun(str(untrained_folder))
    assert not is_begun(str(base))
    begin(str(base), tmp_path / "one", seed=1)
    begin(str(base), tmp_path / "two", seed=2)
    one, two = (load_longvlm(str(tmp_path / name)) for name in ("one", "two"))
    assert is_begun(str(tmp_path / "one"))
    assert one.projector.weight.shape == (128, 64)
    assert not torch.equal(one.projector.weight, two.projector.weight)
    rows, old = one.llm.get_input_embeddings().weight, load_file(base / "model.safetensors")[EMBED]
    assert torch.equal(rows[:-3], old)
    torch.testing.assert_close(rows[-1], rows[:-2].mean(dim=0), atol=1e-6, rtol=0)
    assert one.lay_out("What?", 3, "long_vlm_v1").num_patches == 3


def test_without_embeddings_there_is_nothing_to_begin_with(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    del tensors[EMBED]
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match="copy the checkpoint again"):
        begin(str(base), tmp_path / "to", seed=0)
