"""The model that ships."""

import json
from pathlib import Path

from longvlm import tinyworld
from longvlm.pipeline.answering.grammar import check_spelling
from longvlm.pipeline.engine.grammar import Speller
from longvlm.pipeline.models.longvlm.model import describe_longvlm, load_longvlm
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.pipeline.vision.towers.families import describe_tower
from longvlm.tinyworld.captions import timed_captions
from longvlm.tinyworld.questions import all_questions
from longvlm.tinyworld.scenes import draw_scene, random_generator
from longvlm.tinyworld.typed import draw_typed

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
        texts += [text for one in draw_typed(scene, 77, number) for text in (one.prompt, one.answer)]
        for text in [*texts, *(caption for _, caption in timed_captions(scene))]:
            assert unknown not in tokenizer.encode(text).ids, text


def test_it_can_spell_numbers_and_the_marks_of_json():
    speller = Speller(load_longvlm(tinyworld.MODEL).vocabulary)
    assert not speller.lacking('0123456789-.{}[]":,')
    check_spelling(speller, "number", None)
    check_spelling(speller, "json", '{"type": "boolean"}')


def test_its_confidences_are_calibrated_and_its_card_says_how_well():
    assert load_longvlm(tinyworld.MODEL).option_temperature != 1
    card = (MODEL / "README.md").read_text()
    assert "|  | text | bool | choice | number |" in card
    assert "| expected calibration error |" in card


def test_search_finds_a_frames_own_caption():
    texts = load_text_encoder(f"{tinyworld.MODEL}/tower")
    red, also_red, blue = texts.encode(["a red circle on a meadow", "a red circle", "a blue bar in the night"])
    assert red @ also_red > red @ blue
