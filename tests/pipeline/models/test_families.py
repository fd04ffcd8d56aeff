import json
import shutil

import pytest

from longvlm.pipeline.models.families import can_answer, describe_model, load_model, sight_of
from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.errors import InputError
from models import save_clip_tower, save_llava


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    return str(save_llava(tmp_path_factory.mktemp("families") / "onevision", "llava_onevision"))


def test_a_language_model_is_told_from_a_tower_by_its_config(untrained_folder, onevision, tmp_path):
    assert can_answer(str(untrained_folder))
    assert can_answer(onevision)
    assert not can_answer(str(save_clip_tower(tmp_path / "tower")))
    with pytest.raises(InputError, match="does not exist"):
        can_answer(str(tmp_path / "nowhere"))


def test_each_family_is_described_and_loaded_by_its_own(untrained_folder, onevision):
    assert describe_model(str(untrained_folder)).family == "longvlm"
    assert describe_model(onevision).family == "llava_onevision"
    for folder in (str(untrained_folder), onevision):
        spec, model = describe_model(folder), load_model(folder)
        assert (model.name, model.context, model.mm_hidden_size) == (spec.name, spec.context, spec.mm_hidden_size)
        assert model.templates == spec.templates
        assert all(model.lay_out("What?", 4, template).num_patches == 4 for template in spec.templates)
        assert len(model.option_ids(["yes", "no"])) == 2


def test_a_llava_with_llama_s_fields_unnested_is_read_as_a_longvlm(untrained_folder, tmp_path):
    config = json.loads((untrained_folder / "config.json").read_text())
    for path in untrained_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    assert describe_model(str(tmp_path)).family == "longvlm"


def test_what_an_index_must_hold_is_known_without_weights(untrained_folder, onevision, tmp_path):
    longvlm = Sight(str(untrained_folder / "tower"), -2, 5)
    assert sight_of(str(untrained_folder)) == describe_model(str(untrained_folder)).sight == longvlm
    assert sight_of(onevision) == describe_model(onevision).sight
    shutil.copy(f"{onevision}/config.json", tmp_path)
    assert sight_of(str(tmp_path)) == Sight(str(tmp_path), -1, 0)
