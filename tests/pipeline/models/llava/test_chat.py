import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

from longvlm.pipeline.models.llava.checkpoint import find_llava
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError


def test_prompts_are_the_template_s_words(folders):
    assert find_llava(str(folders["llava"])).chat().text(" Why?") == "USER: <image>\n Why? ASSISTANT:"
    assert find_llava(str(folders["llava_next_video"])).chat().text("Why?") == "USER: <video>\nWhy? ASSISTANT:"
    chatml = "<|im_start|>user <video>\nWhy?<|im_end|><|im_start|>assistant\n"
    assert find_llava(str(folders["llava_onevision"])).chat().text("Why?") == chatml


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_ids_are_the_tokenizer_s_for_the_text_with_its_placeholder_repeated(folder, num_tokens):
    chat = find_llava(str(folder)).chat()
    place = chat.tokenizer.convert_ids_to_tokens(chat.place)
    text = chat.text("What happens?").replace(place, place * num_tokens)
    prompt = chat.lay_out("What happens?", num_tokens, "chat")
    assert list(prompt.ids) == AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert set(prompt.ids[prompt.first_patch : prompt.first_patch + num_tokens]) == {chat.place}
    assert prompt.ids.count(chat.place) == prompt.num_patches == num_tokens


def test_ids_are_those_of_transformers_processor(folders):
    """LLaVA's is the one processor of the family that runs without torchvision."""
    folder = folders["llava"]
    chat = find_llava(str(folder)).chat()
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat.template,
    )
    image = Image.fromarray(np.zeros((56, 56, 3), np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What happens?"}]
    [theirs] = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    assert list(chat.lay_out("What happens?", 16, "chat").ids) == list(theirs)


def test_a_begin_mark_that_the_template_writes_is_not_doubled(folders, tmp_path):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + template)
    plain, marked = find_llava(str(folders["llava"])).chat(), find_llava(str(folder)).chat()
    assert marked.text("Why?").startswith("<s>USER")
    assert marked.lay_out("Why?", 3, "chat").ids == plain.lay_out("Why?", 3, "chat").ids


def test_options_follow_the_cue_after_a_space_unless_it_ends_in_one(folder):
    chat = find_llava(str(folder)).chat()
    options = chat.option_ids(["Yes", "not at all"])
    space = "" if folder.name == "llava_onevision" else " "
    for option, ids in zip(["Yes", "not at all"], options, strict=True):
        whole = chat.encode(chat.text("Is it red?") + space + option)
        assert whole == [*chat.encode(chat.text("Is it red?")), *ids]
        assert chat.decode(ids) == option


def test_an_option_without_tokens_is_refused(folders):
    with pytest.raises(InputError, match="the option '' has no tokens of its own"):
        find_llava(str(folders["llava_onevision"])).chat().option_ids(["yes", ""])


@pytest.mark.parametrize("mark", ["<video>", "<image>"])
def test_a_question_with_a_placeholder_is_refused(folder, mark):
    chat = find_llava(str(folder)).chat()
    if chat.tokenizer.convert_tokens_to_ids(mark) not in chat.marks:
        assert chat.lay_out(f"What is {mark}?", 2, "chat")  # a word like others to LLaVA-1.5
        return
    with pytest.raises(TerminalError, match=f"the question contains .*{mark}") as caught:
        chat.lay_out(f"What is {mark}?", 2, "chat")
    assert caught.value.code is ErrorCode.ANSWER_FAILED


@pytest.mark.usefixtures("impatient")
def test_a_question_that_a_template_refuses_or_never_gets_done_with_fails_alone(folders, tmp_path):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(
        "<image>{% set asked = messages[0].content[1].text %}{{ asked }}"
        "{% if asked == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{% if asked == 'on' %}{{ 10 ** (asked | length * 10 ** 9) }}{% endif %}"
    )
    chat = find_llava(str(folder)).chat()
    for question, why in (("no", "not that"), ("on", "it was not done after 0.2 s")):
        with pytest.raises(TerminalError, match=f"cannot be filled with the question .{why}") as caught:
            chat.lay_out(question, 2, "chat")
        assert caught.value.code is ErrorCode.ANSWER_FAILED
    assert chat.lay_out("yes", 2, "chat")


def test_decoding_leaves_marks_and_margins_out(folder):
    chat = find_llava(str(folder)).chat()
    ids = chat.tokenizer("  A red ball. ", add_special_tokens=False).input_ids
    assert chat.decode([*ids, chat.tokenizer.eos_token_id]) == "A red ball."


def test_the_tokenizer_s_own_template_will_do(folders, tmp_path):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert find_llava(str(folder)).chat().template == template


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template, so nothing says how to ask it"),
        ("USER: what? ASSISTANT:", "has no single place for the image"),
        ("<image><image> ASSISTANT:", "has no single place for the image"),
        ("{% if %}", "cannot be filled with one image and a question"),
        ("{{ messages[0]['content'] + '<image>' }}", "cannot be filled with one image and a question"),
        ("{{ 'a' * 10 ** 12 }}", r"cannot be filled with one image and a question \(it takes more than 512 MB"),
    ],
)
def test_templates_that_cannot_ask_about_a_video_are_refused(folders, tmp_path, template, sentence):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    (folder / "chat_template.json").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=sentence):
        find_llava(str(folder)).chat()


@pytest.mark.parametrize("content", ["{", '{"template": "USER: <image>"}'])
def test_a_damaged_template_file_is_named(folders, tmp_path, content):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    (folder / "chat_template.json").write_text(content)
    with pytest.raises(InputError, match=r"the chat template of .* cannot be read"):
        find_llava(str(folder)).chat()


def test_a_folder_without_a_tokenizer_names_it(folders, tmp_path):
    folder = shutil.copytree(folders["llava"], tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"lacks a tokenizer; copy tokenizer\.json"):
        find_llava(str(folder)).chat()
