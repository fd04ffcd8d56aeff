"""What only SmolVLM2 has: frames counted in words, and the length of the video in its prompt."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, SmolVLMProcessor

from longvlm.pipeline.chat_templates import render
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.models.row_layout import text_and_places
from longvlm.pipeline.models.smolvlm.model import load_smol
from longvlm.pipeline.models.smolvlm.words import in_words
from models import save_smolvlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_smol(str(save_smolvlm(tmp_path_factory.mktemp("smol"))))


def whole_prefix(times_s, duration_s):
    """Frames at some times, nothing merged, each a segment."""
    places = [(time_s, row, column) for time_s in times_s for row in range(2) for column in range(2)]
    times = SegmentTimes(0, (4,) * len(times_s), tuple(times_s), (*times_s[1:], duration_s))
    positions = torch.tensor(places, dtype=torch.float64)
    return VideoPrefix(torch.zeros(len(places), 32), len(times_s), times, positions, (2, 2))


@pytest.mark.parametrize(
    ("times_s", "duration_s"), [([0.0, 1.96, 59.99, 61.0], 75.9), ([0.5], 1.0), ([3600.0], 7325.2)]
)
def test_the_prompt_is_what_transformers_processor_writes(model, monkeypatch, times_s, duration_s):
    monkeypatch.setattr(processing_smolvlm, "num2words", in_words)  # what it does not install
    oracle = SimpleNamespace(
        image_seq_len=4,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    seen = {
        "pixel_values": torch.zeros(1, len(times_s), 3, 64, 64),
        "video_metadata": [SimpleNamespace(fps=25, timestamps=times_s, duration=duration_s)],
    }
    written = SmolVLMProcessor.replace_video_token(oracle, seen, 0)
    content = [{"type": "video"}, {"type": "text", "text": "What is it?"}]
    text = render(DEFAULT_CHAT_TEMPLATE, [{"role": "user", "content": content}], {})
    prompt = model.lay_out("What is it?", 1, "chat")
    ours = (
        *prompt.ids[: prompt.first_patch],
        *text_and_places(model.blocks(whole_prefix(times_s, duration_s)), model.prompt.place),
        *prompt.ids[prompt.first_patch + 1 :],
    )
    theirs = model.prompt.tokenizer(text.replace("<video>", written), add_special_tokens=False).input_ids
    assert list(ours) == theirs


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (1, "one"),
        (13, "thirteen"),
        (20, "twenty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (999, "nine hundred and ninety-nine"),
        (1000, "one thousand"),
        (1001, "one thousand and one"),
        (1234, "one thousand, two hundred and thirty-four"),
        (20_100, "twenty thousand, one hundred"),
        (1_000_013, "one million and thirteen"),
        (2_345_678, "two million, three hundred and forty-five thousand, six hundred and seventy-eight"),
    ],
)
def test_frames_are_counted_in_words(number, words):
    assert in_words(number) == words
