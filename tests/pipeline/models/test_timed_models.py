"""Qwen3-VL and SmolVLM2 from frames to answers, held to transformers' own models over the same frames."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from longvlm.pipeline.engine.batch import Batch
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.grammar import Speller
from longvlm.pipeline.engine.reference import PlainWhole
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.engine.sequences import read_group
from longvlm.pipeline.models.families import describe_model, load_model, load_whole
from longvlm.pipeline.models.prefix import prefix_of
from longvlm.pipeline.vision.encode import encode_units
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower
from longvlm.schemas import tables
from longvlm.schemas.recipe import AnswerRecipe, IndexRecipe, from_settings
from vlms import save_qwen3_vl, save_smolvlm

QUESTIONS = ("What is it?", "Who?", "Why does it go there, and when?")
GRIDS = {"qwen3_vl": (2, 3), "smolvlm": None}


@pytest.fixture(scope="module", params=[save_qwen3_vl, save_smolvlm])
def folder(request, tmp_path_factory):
    return str(request.param(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def recipe(folder):
    """Four frames a segment, all of their tokens kept."""
    tower = describe_tower(folder)
    if isinstance(tower.image_size, tuple):
        tower = tower.shown((2, 3), None)
    return unmerged(tower)


def unmerged(tower, frames_per_segment=4) -> IndexRecipe:
    settings = {"base": "tiny", "frames_per_segment": frames_per_segment, "segment_s": 2.0}
    keep = tower.num_pictures(frames_per_segment) * tower.num_patches
    return from_settings({**settings, "tokens_per_segment": keep}, tower)


def watched(recipe, segments=((0, 12, 25, 37), (50, 62, 75, 87), (100, 112, 125)), seed=0) -> pa.Table:
    """A unit of FRAMES: random pictures, at 25 frames a second."""
    height, width = recipe.tower.frame_size
    numbers = [number for segment in segments for number in segment]
    frames = np.random.default_rng(seed).integers(0, 256, (len(numbers), height, width, 3), np.uint8)
    described = [
        {
            "segment": i,
            "start_s": 2.0 * i,
            "end_s": 2.0 * i + len(segment) / 2,
            "frames": list(segment),
            "times_s": [number / 25 for number in segment],
        }
        for i, segment in enumerate(segments)
    ]
    row = {"video_id": "v", "write_id": "w", "unit": 0, "num_units": 1, "num_segments": len(segments)}
    row |= {"segments": described, "frame_height": height, "frame_width": width, "frames": frames.tobytes()}
    return pa.Table.from_pylist([row], schema=tables.FRAMES)


def stored(folder, recipe, unit):
    """The video as an index stores it: its tokens, and its segments."""
    (encoded,) = encode_units(unit, load_tower(folder), recipe).to_pylist()
    assert encoded["error"] is None
    rows = [{"video_id": "v", "recipe": "r", "write_id": "w", **segment} for segment in encoded["segments"]]
    return from_arrow(pa.Table.from_pylist(rows, schema=tables.TOKENS)), encoded["segments"]


def shown_frames(recipe, unit):
    """All frames as the tower is shown them, a last picture that is not full filled up."""
    row = unit.to_pylist()[0]
    frames = np.frombuffer(row["frames"], np.uint8).reshape(-1, row["frame_height"], row["frame_width"], 3)
    places, first = [], 0
    for segment in row["segments"]:
        own = list(range(first, first + len(segment["frames"])))
        places += own + own[-1:] * (-len(own) % recipe.tower.frames_per_picture)
        first += len(own)
    return torch.from_numpy(frames[places])


def answer_recipe(folder, precision="float32", **settings):
    return AnswerRecipe(folder, "w", "i", template="chat", precision=precision, max_new_tokens=12, **settings)


def logits_after(model, prefix, question):
    """The engine's logits after a prompt's last token."""
    group, refused = read_group(model, Speller(model.vocabulary), answer_recipe(model.name), Group(prefix, [Request(0, question)]))
    assert not refused
    batch = Batch(model.llm, model.device)
    with torch.inference_mode():
        batch.add_prefixes([group.prefix])
        (done,) = batch.begin([group.pending[0]])
        return batch.logits(done.hidden)[0]


def test_logits_over_a_shared_prefix_are_those_of_the_whole_model_over_frames(folder, recipe):
    unit = watched(recipe)
    tokens, segments = stored(folder, recipe, unit)
    sight = describe_model(folder).sight.reading(recipe.tower)
    prefix = prefix_of(tokens, segments, sight)
    exact = load_tower(folder).encode(shown_frames(recipe, unit)).patches.flatten(0, 1)
    model, whole = load_model(folder), load_whole(folder)
    view = whole.show(shown_frames(recipe, unit), prefix)
    for question in QUESTIONS:
        prompt = whole.words.lay_out(question, 1, "chat")
        ids = torch.tensor([*prompt.ids[: prompt.first_patch], *view.ids, *prompt.ids[prompt.first_patch + 1 :]])
        with torch.inference_mode():
            theirs = whole.llm(**view.inputs(ids, prompt.first_patch)).logits[0, -1]
        unrounded = type(prefix)(exact, prefix.num_whole_frames, prefix.times, prefix.positions, prefix.patch_grid)
        torch.testing.assert_close(logits_after(model, unrounded, question), theirs, atol=1e-4, rtol=0)
        through_store = logits_after(model, prefix, question)
        print(float((through_store - theirs).abs().max()), float(theirs.abs().max()))
