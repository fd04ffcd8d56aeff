import pytest
from reference_outputs import read_json

from longvlm.pipeline.models.prompt import lay_out, option_ids, render, tidy
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from support import GOLDENS, missing

NAME = "long_vlm_v1"


@pytest.mark.parity
def test_prompts_are_the_reference_s_word_for_word(record):
    text = render(record.about["question"], record.about["video_token_len"], use_start_end=record.use_start_end)
    assert text == record.prompt


@pytest.mark.parity
def test_input_ids_are_the_reference_s(record):
    tokenizer = record.golden.models["full"].tokenizer
    num_patches = record.about["video_token_len"]
    prompt = lay_out(tokenizer, record.about["question"], num_patches, use_start_end=record.use_start_end, name=NAME)
    assert list(prompt.ids) == record.array("input_ids").tolist()
    patches = prompt.ids[prompt.first_patch : prompt.first_patch + num_patches]
    assert set(patches) == {record.golden.about["token_ids"]["<vid_patch>"]}


def test_the_layout():
    text = render(" Why? ", 3)
    assert "natural language.Follow the instructions" in text
    assert text.endswith("video. USER: <vid_start><vid_patch><vid_patch><vid_patch><vid_end>\n Why?  ASSISTANT:")
    assert " USER: <vid_patch>\nWhy? " in render("Why?", 1, use_start_end=False)


@pytest.mark.parametrize("use_start_end", [True, False])
def test_placeholders_are_found_whatever_their_number(untrained, use_start_end):
    for num_patches in (1, 7, 305, 2000):
        prompt = lay_out(untrained.tokenizer, "What?", num_patches, use_start_end=use_start_end, name=NAME)
        tokens = [untrained.tokenizer.id_to_token(i) for i in prompt.ids]
        assert tokens.count("<vid_patch>") == num_patches
        assert tokens.index("<vid_patch>") == prompt.first_patch
        assert tokens.count("<vid_start>") == tokens.count("<vid_end>") == use_start_end
        assert tokens[0] == "<s>"


@pytest.mark.parametrize("mark", ["<vid_start>", "<vid_patch>", "<vid_end>", "<vid_start><vid_patch><vid_end>"])
@pytest.mark.parametrize("use_start_end", [True, False])
def test_a_question_with_video_tokens_is_refused(untrained, mark, use_start_end):
    with pytest.raises(TerminalError, match="the question contains <vid_patch>") as caught:
        lay_out(untrained.tokenizer, f"{mark} what?", 4, use_start_end=use_start_end, name=NAME)
    assert caught.value.code is ErrorCode.ANSWER_FAILED


def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="template 'vicuna' is not known; use one of long_vlm_v1"):
        render("What?", 1, name="vicuna")


@pytest.mark.parity
def test_options_are_the_words_that_an_answer_in_training_begins_with(golden):
    tokenizer = golden.models["full"].tokenizer
    text = render("Is it a dog?", 1)
    prompt = tokenizer.encode(text).ids
    for option, ids in zip(["Yes", "two dogs"], option_ids(tokenizer, ["Yes", "two dogs"]), strict=True):
        assert tokenizer.encode(f"{text} {option}").ids == [*prompt, *ids]


def test_an_option_without_words_is_refused(untrained):
    with pytest.raises(InputError, match="the option '' has no tokens of its own as an answer"):
        option_ids(untrained.tokenizer, ["yes", ""])


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("two dogs", "two dogs"),
        (" a class</s>", "a class"),
        ("  It is </s>", "It is"),
        ("He runs</s></s>", "He runs"),
        ("He runs</s> </s>\n", "He runs"),
        ("miss ", "miss"),
        ("a > b", "a > b"),
        ("ends with slash/", "ends with slash/"),
        ("Paris </s> extra", "Paris </s> extra"),
        ("s", "s"),
        ("</s>", ""),
        ("", ""),
    ],
)
def test_only_the_closing_mark_is_taken_off(raw, text):
    assert tidy(raw) == text


@pytest.mark.parity
def test_answers_differ_from_the_reference_s_only_by_what_it_strips_too_much():
    for case in read_json("eval_golden.json").get("postprocess") or missing(GOLDENS, "answers as post-processed"):
        ours, theirs = tidy(case["raw"]), case["pred"]
        assert ours.startswith(theirs)
        assert set(ours[len(theirs) :]) <= set("</s> ")
