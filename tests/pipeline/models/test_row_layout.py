import json
import shutil

import pytest
import torch

from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.reference import PlainTokens
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.longvlm.model import describe_longvlm, load_longvlm
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.models.prompt import clock, marker_ids
from longvlm.pipeline.models.row_layout import TokenBlock, fold
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe
from support import moved

RECIPE = AnswerRecipe("model", "weights", "index", precision="float32", max_new_tokens=12)
QUESTIONS = ("What happens?", "Describe the large yellow square in detail, then count the stars.", "Who?")


@pytest.fixture(scope="module")
def folder(untrained_folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("marked") / "model"
    shutil.copytree(untrained_folder, made)
    return set_layout(made, "time_markers")


@pytest.fixture(scope="module")
def marked(folder):
    return load_longvlm(str(folder))


def segments(num_global, counts, starts_s):
    return SegmentTimes(num_global, counts, starts_s, tuple(start_s + 2 for start_s in starts_s))


def set_layout(folder, layout):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_prompt_layout": layout}))
    return folder


def prefix_with(times):
    return VideoPrefix(torch.randn(times.num_rows, 64, generator=torch.Generator().manual_seed(0)), times=times)


def test_each_segment_is_followed_by_the_time_it_began(marked, device, agree):
    prefix = prefix_with(segments(2, (3, 1, 2), (0.0, 8.9, 3661.0)))
    rows, embed = moved(marked, device).read(prefix).embeds, marked.llm.get_input_embeddings()
    expected = [marked.projector(prefix.rows[:2])]
    for start, count, text in ((2, 3, "0:00"), (5, 1, "0:08"), (6, 2, "1:01:01")):
        ids = marked.tokenizer.encode(text, add_special_tokens=False).ids
        assert marker_ids(marked.tokenizer, {"0:00": 0.0, "0:08": 8.9, "1:01:01": 3661.0}[text]) == tuple(ids)
        expected += [marked.projector(prefix.rows[start : start + count]), embed(torch.tensor(ids))]
    agree(rows, torch.cat(expected), atol=1e-5, rtol=1.3e-6)


def test_gradients_reach_projector_and_markers(marked, folder):
    model = load_longvlm(str(folder))
    model.llm.requires_grad_(requires_grad=True)
    model.projector.requires_grad_(requires_grad=True)
    model.read(prefix_with(segments(0, (2, 2), (0.0, 10.0)))).embeds.sum().backward()
    assert model.projector.weight.grad.abs().sum() > 0
    touched = model.llm.get_input_embeddings().weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert set(touched) == {*marker_ids(marked.tokenizer, 0.0), *marker_ids(marked.tokenizer, 10.0)}


@pytest.mark.parametrize(
    "times", [segments(5, (8,) * 4, (0.0, 10.0, 20.0, 3600.0)), segments(0, (1, 9, 2), (0.0, 2.0, 4.0))]
)
def test_the_engine_answers_as_one_question_at_a_time_does(marked, times, device, agree):
    prefix = prefix_with(times)
    plain = PlainTokens(marked, RECIPE)
    view = plain.show(prefix)
    expected = {question: plain.answer(view, Request(question, question)) for question in QUESTIONS}
    chosen = plain.answer(view, Request("red", "Red?", options=("yes", "no")))
    engine = Engine(moved(marked, device), RECIPE)
    requests = [*(Request(question, question) for question in QUESTIONS), Request("red", "Red?", options=("yes", "no"))]
    answers = {answer.key: answer for answer in engine.answer([Group(prefix, requests)])}
    num_rows = times.num_rows + sum(marked.num_text_rows(start_s, start_s) for start_s in times.starts_s)
    for question, answer in expected.items():
        assert (answers[question].text, answers[question].num_new_tokens) == (answer.text, answer.num_new_tokens)
        assert answers[question].num_visual_tokens == answer.num_visual_tokens == num_rows
        assert answers[question].num_prompt_tokens == answer.num_prompt_tokens
        assert answers[question].attention.shape == (times.num_rows,)
    assert answers["red"].text == chosen.text
    agree(answers["red"].confidence, chosen.confidence, atol=1e-5)


def test_what_a_marker_drew_is_its_segment_s():
    blocks = [TokenBlock(1), TokenBlock(2, after=(7, 8)), TokenBlock(1, after=(7,))]
    seen = torch.tensor([0.1, 0.2, 0.3, 0.04, 0.02, 0.25, 0.09])
    expected = torch.tensor([0.1, 0.23, 0.33, 0.34])
    torch.testing.assert_close(fold(seen, blocks), expected)
    torch.testing.assert_close(fold(seen[:4], [TokenBlock(1), TokenBlock(2), TokenBlock(1)]), seen[:4])


def test_a_marked_model_has_to_be_told_the_times_of_its_rows(marked):
    with pytest.raises(ValueError, match="say when segments began, and nobody did"):
        marked.read(VideoPrefix(torch.zeros(4, 64)))


def test_the_layout_is_part_of_what_decides_answers(untrained_folder, folder, tmp_path):
    plain = describe_longvlm(str(untrained_folder)).weights
    assert describe_longvlm(str(folder)).weights != plain
    said = set_layout(shutil.copytree(untrained_folder, tmp_path / "plain"), "plain")
    assert describe_longvlm(str(said)).weights == plain
    with pytest.raises(InputError, match="asks for the prompt layout 'numbers'; set mm_prompt_layout"):
        describe_longvlm(str(set_layout(said, "numbers")))


def test_clocks():
    assert [clock(seconds) for seconds in (0, 8.99, 60, 3599.5, 3723)] == ["0:00", "0:08", "1:00", "59:59", "1:02:03"]
