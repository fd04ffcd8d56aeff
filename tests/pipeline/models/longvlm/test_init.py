import torch

from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.longvlm.init import WORDS, Shape, build_untrained
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.recipe import AnswerRecipe


def test_the_same_seed_writes_the_same_model(untrained_folder, tmp_path):
    build_untrained(tmp_path / "again", "tower", 64)
    build_untrained(tmp_path / "other", "tower", 64, seed=1)
    for file in untrained_folder.iterdir():
        if file.is_file():
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (untrained_folder, tmp_path / "other")]
    assert weights[0] != weights[1]


def test_it_answers_in_words(untrained_folder):
    recipe = AnswerRecipe("m", "w", "i", precision="float32", max_new_tokens=12)
    group = Group(VideoPrefix(torch.ones(3, 64)), [Request("zebra", "What has the zebra?")])
    (answer,) = Engine(load_longvlm(str(untrained_folder)), recipe).answer([group])
    assert answer.text
    assert set(answer.text.split()) <= set(WORDS)


def test_sizes_can_be_chosen(tmp_path):
    build_untrained(tmp_path, "openai/clip-vit-large-patch14", 1024, Shape(hidden=64, layers=3))
    model = load_longvlm(str(tmp_path))
    assert model.projector.weight.shape == (64, 1024)
    assert len(model.llm.model.layers) == 3
