"""The model that ships."""

import json
from pathlib import Path

from longvlm import tinyworld
from longvlm.pipeline.models.longvlm.model import describe_longvlm, load_longvlm
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.pipeline.vision.tower import describe_tower
from longvlm.tinyworld.captions import timed_captions
from longvlm.tinyworld.questions import all_questions
from longvlm.tinyworld.scenes import draw_scene, random_generator

MODEL = Path(tinyworld.MODEL)


def test_it_is_small_and_holds_no_pickles():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_it_was_trained_on_this_world_and_lies_in_one_piece():
    config = json.loads((MODEL / "config.json").read_text())
    assert config[tinyworld.VERSION_FIELD] == tinyworld.WORLD_VERSION
    spec = describe_longvlm(tinyworld.MODEL)
    assert Path(spec.sight.tower) == MODEL / "tower"
    assert spec.templates[0] == "brief"
    assert spec.mm_hidden_size == describe_tower(spec.sight.tower).dim


def test_it_knows_every_word_of_its_world():
    tokenizer = load_longvlm(tinyworld.MODEL).tokenizer
    unknown = tokenizer.token_to_id("<unk>")
    for number in range(200):
        scene = draw_scene(77, number)
        asked = all_questions(scene, random_generator(77, number, 1))
        texts = [text for one in asked for text in (one.question, one.answer)]
        for text in [*texts, *(caption for _, caption in timed_captions(scene))]:
            assert unknown not in tokenizer.encode(text).ids, text


def test_search_finds_a_frames_own_caption():
    texts = load_text_encoder(f"{tinyworld.MODEL}/tower")
    red, also_red, blue = texts.encode(["a red circle on a meadow", "a red circle", "a blue bar in the night"])
    assert red @ also_red > red @ blue
