"""What only Qwen3-VL has: positions along three axes, and times as text before each pair of frames."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.models.qwen3_vl.model import load_qwen, positions_of
from longvlm.pipeline.models.row_layout import text_and_places
from longvlm.schemas.errors import TerminalError
from models import save_qwen3_vl


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_qwen(str(save_qwen3_vl(tmp_path_factory.mktemp("qwen"))))


def whole_prefix(indices, fps, grid):
    """Pictures of two frames each, at their times, nothing merged; a segment every two pictures."""
    padded = [*indices, *indices[-1:] * (len(indices) % 2)]
    times_s = [(first + second) / 2 / fps for first, second in zip(padded[::2], padded[1::2], strict=True)]
    rows, columns = grid
    places = [(time_s, row, column) for time_s in times_s for row in range(rows) for column in range(columns)]
    counts = [rows * columns * len(times_s[i : i + 2]) for i in range(0, len(times_s), 2)]
    times = SegmentTimes(0, tuple(counts), tuple(times_s[::2]), tuple(time_s + 1 for time_s in times_s[::2]))
    positions = torch.tensor(places, dtype=torch.float64)
    return VideoPrefix(torch.zeros(len(places), 128), len(indices), times, positions, grid)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 1), (2, 5)])
def test_positions_are_those_of_the_installed_transformers(model, grid):
    prefix = whole_prefix([0, 12, 25, 37, 50], 25, grid)
    before, after = [5, 6, 7], [9, 8]
    ids = torch.tensor([[*before, *text_and_places(model.blocks(prefix), model.config.video_token_id), *after]])
    oracle = SimpleNamespace(config=model.config)
    oracle.get_vision_position_ids = lambda *args, **more: Qwen3VLModel.get_vision_position_ids(oracle, *args, **more)
    theirs, delta = Qwen3VLModel.get_rope_index(
        oracle,
        ids,
        (ids == model.config.video_token_id).int() * 2,
        video_grid_thw=torch.tensor([[3, 2 * grid[0], 2 * grid[1]]]),
    )
    ours, num_positions = positions_of(prefix, model.blocks(prefix))
    assert torch.equal(ours + len(before), theirs[:, 0, len(before) : -len(after)].float())
    assert len(before) + num_positions == int(theirs[0, 0, -len(after)])
    assert num_positions - ours.shape[1] == int(delta)
    assert model.extent(prefix).num_positions == num_positions


@pytest.mark.parametrize("indices", [[0, 12, 25, 37], [3, 14, 31], [0], [7, 7, 7, 250, 999]])
def test_the_prompt_is_what_transformers_processor_writes(model, indices):
    tokenizer, prefix = model.prompt.tokenizer, whole_prefix(indices, 29.97, (2, 3))
    oracle = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    oracle._calculate_timestamps = lambda *args: Qwen3VLProcessor._calculate_timestamps(oracle, *args)
    seen = {
        "video_grid_thw": torch.tensor([[(len(indices) + 1) // 2, 4, 6]]),
        "video_metadata": [SimpleNamespace(fps=29.97, frames_indices=list(indices))],
    }
    written = Qwen3VLProcessor.replace_video_token(oracle, seen, 0)
    before, after = model.prompt.split("What is it?")
    prompt = model.lay_out("What is it?", 1, "chat")
    ours = (
        *prompt.ids[: prompt.first_patch],
        *text_and_places(model.blocks(prefix), model.config.video_token_id),
        *prompt.ids[prompt.first_patch + 1 :],
    )
    assert list(ours) == tokenizer(f"{before}{written}{after}", add_special_tokens=False).input_ids


def test_a_merged_token_stands_at_its_mean_place_and_text_goes_on_behind_the_grid(model):
    times = SegmentTimes(0, (2, 1), (0.0, 2.0), (2.0, 4.0))
    places = torch.tensor([[0.7, 0.5, 1.25], [1.0, 1.0, 0.0], [3.0, 0.25, 2.0]], dtype=torch.float64)
    prefix = VideoPrefix(torch.randn(3, 128), None, times, places, (2, 3))
    blocks = model.blocks(prefix)
    positions, num_positions = positions_of(prefix, blocks)
    first = len(blocks[0].before)
    assert positions[:, first].tolist() == [first, first + 0.5, first + 1.25]
    assert positions[:, first + 1].tolist() == [first, first + 1, first]
    assert positions[:, first + 2].tolist() == [first + 3] * 3  # the mark that closes the run
    second = first + 4 + len(blocks[1].before)
    assert positions[:, len(blocks[0].before) + 3 + len(blocks[1].before)].tolist() == [
        second,
        second + 0.25,
        second + 2,
    ]
    assert num_positions == second + 4


def test_deepstack_streams_are_added_where_tokens_are_and_nowhere_else(model):
    times = SegmentTimes(0, (2,), (0.0,), (2.0,))
    rows = torch.randn(2, 128)
    read = model.read(VideoPrefix(rows, None, times, torch.zeros(2, 3, dtype=torch.float64), (2, 3)))
    assert read.added.shape == (3, len(read.embeds), 32)
    is_token = read.added.abs().sum(dim=(0, 2)) > 0
    assert int(is_token.sum()) == 2
    assert torch.equal(read.embeds[is_token], rows[:, :32])
    for layer in range(3):
        assert torch.equal(read.added[layer][is_token], rows[:, 32 * (layer + 1) : 32 * (layer + 2)])


def test_a_tower_without_deepstack_is_one_stream(tmp_path):
    plain = load_qwen(str(save_qwen3_vl(tmp_path, streams=0)))
    times = SegmentTimes(0, (2,), (0.0,), (2.0,))
    read = plain.read(VideoPrefix(torch.randn(2, 32), None, times, torch.zeros(2, 3, dtype=torch.float64), (2, 3)))
    assert plain.mm_hidden_size == 32
    assert read.added is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_one_parameter_with_the_embedding(tmp_path, tied):
    model = load_qwen(str(save_qwen3_vl(tmp_path, tied=tied)))
    assert (model.llm.lm_head.weight is model.llm.get_input_embeddings().weight) == tied
    assert Qwen3VLConfig.from_pretrained(tmp_path).tie_word_embeddings == tied


def test_a_question_that_marks_a_place_of_its_own_is_refused(model):
    for mark in ("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>", "<|image_pad|>"):
        with pytest.raises(TerminalError, match="which mark the video's place; take them out"):
            model.lay_out(f"What {mark}?", 1, "chat")
