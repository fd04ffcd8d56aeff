"""Timed captions: what is learnt at a segment's time marker."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.training.conversations import check_conversations
from longvlm.pipeline.training.packing import Caption, ConversationTokenizer, Example, collate, pack
from longvlm.pipeline.training.parameters import TrainableModel
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import full

TIMES = SegmentTimes(2, (3, 1, 2), (0.0, 10.0, 20.0), (10.0, 20.0, 30.0))
PREFIX = VideoPrefix(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), times=TIMES)
CONVERSATION = (("What is red?", "the square"),)


@pytest.fixture
def marked(untrained_folder, tmp_path):
    folder = tmp_path / "marked"
    shutil.copytree(untrained_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_prompt_layout": "time_markers"}))
    return load_longvlm(str(folder))


def batch_of(model, conversations, average="answer"):
    packed = pack(ConversationTokenizer(model, model.templates[0]), [Example(PREFIX, conversations)], 512)
    return packed, collate(packed.sequences, average, model.device)


@pytest.mark.parametrize(("at_s", "segment"), [(0.0, 0), (9.9, 0), (10.0, 1), (99.0, 2)])
def test_a_caption_is_learnt_at_the_end_of_its_segments_marker(marked, at_s, segment):
    _, batch = batch_of(marked, [Caption(at_s, "red square"), CONVERSATION])
    (place,) = batch.label_positions[batch.label_positions < batch.visual_spans[0][2]].unique().tolist()
    markers = [marked.num_text_rows(start_s, start_s) for start_s in TIMES.starts_s]
    _, start, end = batch.visual_spans[0]
    assert place == start + 2 + sum(TIMES.counts[: segment + 1]) + sum(markers[: segment + 1]) - 1 < end
    words = batch.labels[batch.label_positions == place].tolist()
    assert marked.decode(words) == "red square"


def test_a_caption_counts_as_an_answer_does(marked):
    _, batch = batch_of(marked, [Caption(0.0, "red square"), Caption(10.0, "a large yellow square"), CONVERSATION])
    assert float(batch.weights.sum()) == pytest.approx(3)
    _, by_token = batch_of(marked, [Caption(0.0, "red square"), CONVERSATION], "token")
    assert set(by_token.weights.tolist()) == {1.0}


def test_captions_change_nothing_about_the_loss_of_answers(marked):
    trainable = TrainableModel(marked, replace(full(), precision="float32", gradient_checkpointing=False))
    _, alone = batch_of(marked, [CONVERSATION])
    _, beside = batch_of(marked, [Caption(0.0, "red square"), CONVERSATION])
    beside.weights[beside.label_positions < beside.visual_spans[0][2]] = 0
    examples = [Example(PREFIX, [])]
    with torch.no_grad():
        assert trainable(examples, alone).item() == pytest.approx(trainable(examples, beside).item(), abs=1e-5)


def test_a_model_learns_from_captions_alone(marked):
    trainable = TrainableModel(marked, replace(full(), precision="float32", gradient_checkpointing=False))
    examples = [Example(PREFIX, [])]
    _, batch = batch_of(marked, [Caption(0.0, "red"), Caption(20.0, "blue")])
    optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = trainable(examples, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_without_time_markers_a_caption_is_refused(untrained_folder):
    packed, _ = batch_of(load_longvlm(str(untrained_folder)), [Caption(0.0, "red"), CONVERSATION])
    ((_, place, reason),) = packed.refused
    assert place == 0
    assert "no time markers" in reason


def test_rows_with_a_caption_are_read_as_such():
    (row,) = check_conversations([{"video_id": "v", "start_s": "8", "caption": "a dog runs"}]).to_pylist()
    assert (row["video"], row["at_s"]) == ("v", 8.0)
    assert row["turns"] == [{"question": "", "answer": "a dog runs"}]


@pytest.mark.parametrize("start_s", [None, "soon", -1, float("inf"), float("nan")])
def test_a_caption_without_a_time_is_told(start_s):
    with pytest.raises(InputError, match="row 1 of the conversations has a caption, but start_s"):
        check_conversations([{"video_id": "v", "start_s": start_s, "caption": "a dog runs"}])
