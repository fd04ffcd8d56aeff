from functools import cache

import pytest
import torch

from longvlm.pipeline.answering.typed import as_request, read_value
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.reference import PlainWhole
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.families import load_model, load_whole
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.models.thinking import Said, closed, opens, split_thinking
from longvlm.schemas.errors import ErrorCode
from longvlm.schemas.recipe import AnswerRecipe
from models import QWEN_TEMPLATE, THINKING_TEMPLATE, save_llava, save_qwen3_vl, save_smolvlm, script


@pytest.mark.parametrize(
    ("text", "is_open", "said"),
    [
        ("A box.", False, Said("A box.", None)),
        ("I see red.\n</think>\n\nA box.", True, Said("A box.", "I see red.")),
        ("<think>\nI see red.\n</think>\n\nA box.", False, Said("A box.", "I see red.")),
        ("<think>I see red.</think>A box.", True, Said("A box.", "I see red.")),  # opened once more by the model
        ("I see red.</think>A box.", False, Said("A box.", "I see red.")),  # by a template that is not its own
        ("Well. <think>red</think> A <think>or\ntwo</think> box.", False, Said("Well.  A  box.", "red\nor\ntwo")),
        ("<think>\n\n</think>\n\nA box.", False, Said("A box.", None)),
        ("a</think>b</think>c", True, Said("bc", "a")),
        ("I see", True, Said(None, "I see")),
        ("<think>I see", False, Said(None, "I see")),
        ("<think>a</think>Yes <think>but", False, Said(None, "a\nbut")),
        ("", True, Said(None, None)),
        ("", False, Said("", None)),
        ("1 < 2 > 1 <thinker>", False, Said("1 < 2 > 1 <thinker>", None)),
    ],
)
def test_thinking_is_cut_off_the_answer(text, is_open, said):
    assert split_thinking(text, is_open=is_open) == said


@pytest.mark.parametrize(
    ("said", "is_ended", "code"),
    [
        (Said("A box.", "red"), False, None),  # cut off within the answer: that is shown as with any model
        (Said("", None), False, None),
        (Said("", "red"), True, None),
        (Said("", "red"), False, ErrorCode.CUT_OFF),
        (Said(None, "red"), False, ErrorCode.CUT_OFF),
        (Said(None, "red"), True, ErrorCode.ANSWER_FAILED),
    ],
)
def test_thinking_is_never_the_answer(said, is_ended, code):
    fault = said.fault(7, is_ended=is_ended)
    assert (fault and fault.code) == code
    if code == ErrorCode.CUT_OFF:
        assert "all 7 tokens" in fault.message
        assert fault.message.endswith("raise --max-new-tokens.")


@pytest.mark.parametrize("end", ["", "\n", "\n\n", " "])
def test_a_cue_that_opens_thinking_is_closed_as_templates_close_it(end):
    cue = f"<|im_start|>assistant\n<think>{end}"
    assert opens(cue)
    assert closed(cue) == "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("cue", ["ASSISTANT:", "<think>\n\n</think>\n\n", "Why <think>?\n"])
def test_other_cues_stay_as_they_are(cue):
    assert not opens(cue)
    assert closed(cue) == cue


def opened(folder):
    """LLaVA's turns with a cue that opens thinking."""
    path = folder / "chat_template.json"
    path.write_text(path.read_text().replace("assistant\\n'", "assistant\\n<think>\\n'"))
    return folder


def qwen(path, template):
    return save_qwen3_vl(path / "qwen", tied=False, template=template)


THINKING, WITHIN = ("<think>", "r", "e", "d", "</think>", "A"), ("r", "e", "d", "</think>", "A")
MODELS = {
    "qwen, its cue": lambda path: script(qwen(path, THINKING_TEMPLATE), "\n", WITHIN),
    "qwen, its cue, a special mark": lambda path: script(qwen(path, THINKING_TEMPLATE), "\n", WITHIN, special=True),
    "qwen, by itself": lambda path: script(qwen(path, QWEN_TEMPLATE), "\n", THINKING),
    "smolvlm, by itself": lambda path: script(save_smolvlm(path / "smol"), ":", THINKING, spare="<video>"),
    "llava, its cue": lambda path: opened(
        script(save_llava(path / "llava", "llava_onevision"), "\n", WITHIN, spare="<|im_start|>")
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def thinker(request, tmp_path_factory):
    """A model that writes what it thinks, then A; and whether its template's cue opens that."""
    return str(MODELS[request.param](tmp_path_factory.mktemp("thinker"))), "cue" in request.param


@cache
def loaded(folder):
    """The model of the engine, and that of transformers' own path."""
    return load_model(folder), load_whole(folder)


def seen(folder):
    """A video of two frames, and its prefix."""
    width, (rows, columns) = loaded(folder)[0].mm_hidden_size, (2, 3) if "qwen" in folder else (2, 2)
    if "llava" in folder:
        return torch.zeros(2, 56, 56, 3, dtype=torch.uint8), VideoPrefix(torch.randn(9, width))
    counts = (rows * columns,) if "qwen" in folder else (rows * columns, rows * columns)
    times = SegmentTimes(0, counts, (0.0, 1.0)[: len(counts)], (1.0, 2.0)[: len(counts)])
    prefix = VideoPrefix(
        torch.randn(sum(counts), width), 2, times, torch.zeros(sum(counts), 3, dtype=torch.float64), (rows, columns)
    )
    return torch.zeros(2, 32 * rows, 32 * columns, 3, dtype=torch.uint8), prefix


def asked_both_ways(folder, request, max_new_tokens=12):
    """The answers of the engine, and of transformers' own path."""
    recipe = AnswerRecipe(folder, "w", "i", template="chat", precision="float32", max_new_tokens=max_new_tokens)
    frames, prefix = seen(folder)
    model, whole = loaded(folder)
    (ours,) = Engine(model, recipe).answer([Group(prefix, [request])])
    plain = PlainWhole(whole, recipe)
    return ours, plain.answer(plain.show(frames, prefix), request)


def test_what_was_thought_stands_beside_the_answer(thinker):
    folder, _ = thinker
    for answer in asked_both_ways(folder, Request(0, "What?")):
        assert (answer.text, answer.thinking, answer.error) == ("A", "red", None)


def test_an_answer_that_is_cut_off_while_thinking_is_none(thinker):
    folder, by_cue = thinker
    for answer in asked_both_ways(folder, Request(0, "What?"), max_new_tokens=3):
        assert answer.text is None
        assert answer.thinking == ("red" if by_cue else "re")
        assert answer.error.code == ErrorCode.CUT_OFF
        assert answer.num_new_tokens == 3


@pytest.mark.parametrize(("kind", "choices"), [("bool", None), ("choice", ["red", "blue"]), ("number", None)])
def test_typed_questions_are_answered_without_thinking(thinker, kind, choices):
    folder, by_cue = thinker
    asked = {"question": "What?", "type": kind, "choices": choices, "schema": None}
    ours, theirs = asked_both_ways(folder, as_request(0, asked))
    for answer in (ours, theirs):
        assert answer.error is None
        assert answer.thinking is None
        assert read_value(asked, answer.text) is not None
    assert ours.text == theirs.text
    assert ours.shares == pytest.approx(theirs.shares, abs=1e-5)
    model, _ = loaded(folder)
    free, held = (model.lay_out("What?", 1, "chat", may_think=may_think) for may_think in (True, False))
    assert (free.is_thinking, held.is_thinking) == (by_cue, False)
    spell = model.vocabulary.tokenizer
    after = spell.decode(list(held.ids[held.first_patch + 1 :]), skip_special_tokens=False)
    assert after.endswith("<think>\n\n</think>\n\n") == by_cue
    word = "red" if after[-1] == "\n" else " red"
    assert model.option_ids(["red"]) == [tuple(spell.encode(word, add_special_tokens=False).ids)]
