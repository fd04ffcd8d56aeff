import json
import shutil

import pytest
import torch

from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.longvlm.init import WORDS, Shape, build_untrained, grow_vocabulary
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


def test_a_grown_vocabulary_knows_more_words_and_answers_as_before(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    build_untrained(old, "../tower", 64, Shape(words=("what", "is", "red", "?", ":", "0:08")))
    grow_vocabulary(old, new, ["7", "red", "{"])
    grow_vocabulary(old, tmp_path / "again", ["7", "red", "{"])
    assert (new / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    before, after = load_longvlm(str(old)), load_longvlm(str(new))
    assert after.tokenizer.encode("what is red 7 {").tokens == ["<s>", "what", "is", "red", "7", "{"]
    assert after.llm.config.vocab_size == before.llm.config.vocab_size + 2 == after.tokenizer.get_vocab_size()
    assert [after.tokenizer.id_to_token(i) for i in after.banned_ids] == ["<vid_patch>", "<vid_start>", "<vid_end>"]
    for token in ("red", "0:08", "</s>", "<vid_start>"):
        ours, theirs = (
            model.llm.model.embed_tokens.weight[model.tokenizer.token_to_id(token)] for model in (after, before)
        )
        assert torch.equal(ours, theirs)
    head, read = after.llm.lm_head.weight, after.llm.model.embed_tokens.weight
    seven = after.tokenizer.token_to_id("7")
    known = before.llm.lm_head.weight[: before.tokenizer.token_to_id("<vid_patch>")]
    assert (head[seven] - known.mean(dim=0)).norm() < 0.3 * known.norm(dim=1).mean()
    assert not torch.equal(read[seven], read[after.tokenizer.token_to_id("{")])
    recipe = AnswerRecipe("m", "w", "i", precision="float32", max_new_tokens=12)
    group = Group(
        VideoPrefix(torch.ones(3, 64)), [Request(i, q) for i, q in enumerate(["what?", "is red red", "0:08"])]
    )
    answers = [{a.key: a.text for a in Engine(model, recipe).answer([group])} for model in (before, after)]
    assert answers[0] == answers[1]


def test_only_a_vocabulary_of_words_can_grow(untrained_folder, tmp_path):
    copy = shutil.copytree(untrained_folder, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="not one of whole words"):
        grow_vocabulary(copy, tmp_path / "new", ["seven"])
    assert not (tmp_path / "new").exists()
