from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from reference_outputs import clip_cases
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from longvlm.pipeline.transfer import Fetch
from longvlm.pipeline.vision.encode import (
    BATCHES_AHEAD,
    FRAMES_PER_BATCH,
    encode_units,
    merge_segments,
)
from longvlm.pipeline.vision.merge import merge
from longvlm.pipeline.vision.pictures import SegmentPictures
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.pipeline.vision.towers.clip_tower import FRAMES_PER_FORWARD
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode
from longvlm.schemas.recipe import IndexRecipe, halving_schedule
from models import save_clip_tower, save_siglip_tower


def frames_table(*units: dict) -> pa.Table:
    """FRAMES rows; each unit gives the frame numbers of its `segments` and `frames` (uint8 [F, px, px, 3]) for all."""
    rows = []
    for i, unit in enumerate(units):
        frames = unit.pop("frames", None)
        segments = [
            {
                "segment": s,
                "start_s": float(s),
                "end_s": s + 1.0,
                "frames": list(numbers),
                "times_s": [n / 25 for n in numbers],
            }
            for s, numbers in enumerate(unit.pop("segments", []))
        ]
        row = {"video_id": f"video{i}", "write_id": f"write{i}", "unit": 0, "num_units": 1, "decode_ms": 1.0}
        row |= {"num_segments": len(segments), "segments": segments}
        if frames is not None:
            numbers = [number for segment in segments for number in segment["frames"]]
            frames = frames[np.unique(numbers, return_index=True)[1]] if len(frames) == len(numbers) else frames
            row |= {
                "frames": np.ascontiguousarray(frames).tobytes(),
                "frame_height": frames.shape[1],
                "frame_width": frames.shape[2],
            }
        rows.append({**row, **unit})
    return pa.Table.from_pylist(rows, schema=tables.FRAMES)


def segment_numbers(num_frames: int, per_segment: int) -> list[list[int]]:
    """Frame numbers 0, 3, 6, ... cut into segments, the last perhaps shorter."""
    numbers = list(range(0, 3 * num_frames, 3))
    return [numbers[i : i + per_segment] for i in range(0, num_frames, per_segment)]


def pictures(segments, frames_per_picture=1):
    """What the tower sees of segments, by their frame numbers, at 25 frames a second."""
    return [SegmentPictures.of(numbers, [n / 25 for n in numbers], frames_per_picture) for numbers in segments]


def recipe_for(tower, **changes):
    settings = {"sampling": "interval", "segment_s": 1.0, "frames_per_segment": 4, "tokens_per_segment": 8}
    layers = 5 if tower.spec.has_cls else 0
    return IndexRecipe(**{"name": "test", "tower": tower.spec, "num_global_layers": layers, **settings, **changes})


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return load_tower(str(save_clip_tower(tmp_path_factory.mktemp("clip"))))


def random_frames(num_frames, px=56, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, px, px, 3), dtype=torch.uint8, generator=generator).numpy()


def video_tokens(encoded_unit):
    ids = {"video_id": "v", "recipe": "r", "write_id": "w"}
    return from_arrow(pa.Table.from_pylist([{**ids, **s} for s in encoded_unit["segments"]], schema=tables.TOKENS))


@pytest.mark.parity
@pytest.mark.parametrize("reference", clip_cases())
def test_the_reference_in_float32_and_through_storage(reference, agree):
    golden, recipe, frames, encoded = reference.arrays, reference.recipe, reference.frames, reference.encoded
    numbers = segment_numbers(len(frames), recipe.frames_per_segment)
    merged = merge_segments(encoded, pictures(numbers), recipe)
    local = torch.cat([segment.local for segment in merged])
    memory = torch.stack([segment.cls for segment in merged]).mean(dim=0)
    np.testing.assert_allclose(memory, golden["memory"], atol=1e-4, rtol=0)
    stored = encode_units(frames_table({"frames": frames.numpy(), "segments": numbers}), reference.tower, recipe)
    prefix = video_tokens(stored.to_pylist()[0]).prefix()
    want = torch.from_numpy(np.concatenate([golden["memory"], golden["local"]]))
    assert prefix.shape == want.shape
    num_global = recipe.num_global_layers
    assert torch.cosine_similarity(prefix[:num_global], want[:num_global], dim=-1).min() > 0.999
    if reference.meta.get("tie_sensitive"):  # which of two equal frames a token joins is anyone's choice
        for segment in merged:
            assert segment.sizes.sum() == recipe.patches_per_segment
        weighted = sum((segment.local.double() * segment.sizes[:, None]).sum(dim=0) for segment in merged)
        inputs = encoded.patches.double().sum(dim=(0, 1))
        torch.testing.assert_close(weighted, inputs, atol=1e-2, rtol=1e-4)
        return
    reference.merging.hold(agree, local, golden["local"], atol=1e-4)
    is_far = torch.cosine_similarity(prefix[num_global:], want[num_global:], dim=-1) <= 0.999
    assert not is_far[reference.merging.settled(is_far.view(len(numbers), -1)).flatten()].any()


def test_a_batch_of_units_of_every_kind_goes_through_row_for_row(tower):
    recipe = recipe_for(tower)
    numbers = [[0, 5, 9, 12], [20, 21, 22, 23], [30, 31]]
    failed = {"error_code": "truncated", "error": "the file ends early.", "segments": []}
    table = frames_table(
        {"frames": random_frames(10), "segments": numbers, "codec": "h264", "num_frames": 99},
        failed,
        {"frames": random_frames(4, seed=1), "segments": numbers[:1]},
        {"frames": random_frames(3, px=100, seed=2), "segments": [[7, 7, 7]]},
    )
    encoded = encode_units(table, tower, recipe)
    assert encoded.schema.equals(tables.ENCODED)
    rows = encoded.to_pylist()
    assert [row["video_id"] for row in rows] == ["video0", "video1", "video2", "video3"]
    assert [len(row["segments"]) for row in rows] == [3, 0, 1, 1]
    assert [row["error_code"] for row in rows] == [None, "truncated", None, None]
    assert rows[1]["error"] == "the file ends early."
    assert (rows[0]["codec"], rows[0]["num_frames"], rows[0]["decode_ms"]) == ("h264", 99, 1.0)
    assert all((row["encode_ms"] > 0) == (row["error_code"] is None) for row in rows)
    short = rows[0]["segments"][2]
    assert (short["segment"], short["start_s"], short["end_s"]) == (2, 2.0, 3.0)
    assert (short["first_frame"], short["last_frame"], short["num_frames"]) == (30, 31, 2)
    assert (short["num_tokens"], short["dim"], short["dtype"], short["thumbnail"]) == (8, 64, "float16", None)
    assert np.linalg.norm(short["embedding"]) == pytest.approx(1, abs=1e-5)


def test_a_frame_shown_twice_is_encoded_once_and_stands_twice(tower, monkeypatch):
    recipe = recipe_for(tower)
    numbers = [[0, 0, 7, 7], [7, 9, 9, 9], [12, 13, 14, 15]]
    order = [0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 5, 6]
    frames = random_frames(7)[order]
    by_hand = merge_segments(tower.encode(torch.from_numpy(frames)), pictures(numbers), recipe)
    encode, seen = tower.encode, []
    monkeypatch.setattr(
        tower, "encode", lambda given, *settings: (seen.append(len(given)), encode(given, *settings))[1]
    )
    units = [{"frames": frames, "segments": numbers}, {"frames": random_frames(4, seed=1), "segments": [[0, 1, 2, 3]]}]
    first, second = encode_units(frames_table(*units), tower, recipe).to_pylist()
    assert sum(seen) == 7 + 4
    assert len(second["segments"]) == 1
    assert [segment["frames"] for segment in first["segments"]] == [[0, 7], [7, 9], [12, 13, 14, 15]]
    assert all(len(segment["frames"]) == len(segment["times_s"]) for segment in first["segments"])
    for segment, merged in zip(first["segments"], by_hand, strict=True):
        of_frames = np.frombuffer(segment["frame_embeddings"], np.int8).reshape(len(segment["frames"]), -1)
        places = [segment["frames"].index(number) for number in numbers[segment["segment"]]]  # with the repeated ones
        unit = of_frames / np.linalg.norm(of_frames.astype(float), axis=1, keepdims=True)
        mean = unit[places].mean(axis=0)
        assert (of_frames.max(axis=1) == 127).any() or (of_frames.min(axis=1) == -127).any()
        np.testing.assert_allclose(mean / np.linalg.norm(mean), segment["embedding"], atol=0.01)
        sizes = np.frombuffer(segment["sizes"], "<u2")
        assert segment["num_frames"] == 4
        assert sizes.sum() == recipe.patches_per_segment
        assert sizes.tolist() == merged.sizes.tolist()
        local = np.frombuffer(segment["local"], "<f2").reshape(merged.local.shape)
        np.testing.assert_allclose(local, merged.local.numpy(), atol=2e-3)


def test_what_stands_still_is_encoded_once_and_kept_as_it_would_be(tower, monkeypatch):
    recipe = recipe_for(tower)
    numbers = segment_numbers(12, 4)
    frames = random_frames(5)[[0, 0, 0, 0, 0, 1, 2, 2, 3, 4, 4, 4]]
    by_hand = merge_segments(tower.encode(torch.from_numpy(frames)), pictures(numbers), recipe)
    encode, seen = tower.encode, []
    monkeypatch.setattr(
        tower, "encode", lambda given, *settings: (seen.append(len(given)), encode(given, *settings))[1]
    )
    (unit,) = encode_units(frames_table({"frames": frames, "segments": numbers}), tower, recipe).to_pylist()
    assert sum(seen) == 5
    for segment, merged in zip(unit["segments"], by_hand, strict=True):
        assert segment["num_frames"] == len(segment["frames"]) == 4
        cls = np.frombuffer(segment["cls"], "<f2").reshape(merged.cls.shape)
        np.testing.assert_allclose(cls, merged.cls.numpy(), atol=2e-3)
        assert np.frombuffer(segment["sizes"], "<u2").sum() == recipe.patches_per_segment


def test_a_segment_keeps_no_more_tokens_than_its_frames_have_patches(tower):
    num_patches = tower.spec.num_patches
    recipe = recipe_for(tower, tokens_per_segment=2 * num_patches)
    numbers = [[3, 3, 3, 3], [3, 3, 3, 5], [5, 6, 7, 8]]
    frames = random_frames(6)[[0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4]]
    (row,) = encode_units(frames_table({"frames": frames, "segments": numbers}), tower, recipe).to_pylist()
    assert [segment["num_tokens"] for segment in row["segments"]] == [num_patches, 2 * num_patches, 2 * num_patches]
    uniform = recipe_for(tower, tokens_per_segment=2 * num_patches, sampling="uniform", num_segments=3, segment_s=None)
    (row,) = encode_units(frames_table({"frames": frames, "segments": numbers}), tower, uniform).to_pylist()
    assert [segment["num_tokens"] for segment in row["segments"]] == [2 * num_patches] * 3


def test_tokens_are_those_of_each_segment_alone(tower, monkeypatch):
    recipe = recipe_for(tower)
    numbers = [[0, 5, 9, 12], [20, 21, 22, 23], [30, 31]]
    frames = random_frames(10)
    for batch_frames in (FRAMES_PER_BATCH["cpu"], 1):
        monkeypatch.setitem(FRAMES_PER_BATCH, "cpu", batch_frames)
        table = frames_table({"frames": frames, "segments": numbers}, {"frames": frames, "segments": numbers})
        for unit in encode_units(table, tower, recipe).to_pylist():
            start = 0
            for row, frame_numbers in zip(unit["segments"], numbers, strict=True):
                part = video_tokens({"segments": [row]})
                alone = tower.encode(torch.from_numpy(frames[start : start + len(frame_numbers)]))
                start += len(frame_numbers)
                patches = alone.patches.flatten(0, 1)[None]
                want = merge(patches, halving_schedule(patches.shape[1], 8))
                torch.testing.assert_close(part.local.float(), want.tokens[0], atol=5e-3, rtol=5e-3)
                torch.testing.assert_close(part.global_tokens, alone.cls.mean(dim=0), atol=5e-3, rtol=5e-3)
                assert torch.equal(part.sizes, want.sizes[0])
                at = torch.tensor(frame_numbers)
                assert torch.equal(part.spans, at[want.spans[0] // tower.spec.num_patches])


def test_a_segment_with_fewer_tokens_than_are_kept_keeps_them_all(tower):
    recipe = recipe_for(tower, frames_per_segment=10, tokens_per_segment=80)
    table = frames_table({"frames": random_frames(3), "segments": [[4, 6, 8]]})
    part = video_tokens(encode_units(table, tower, recipe).to_pylist()[0])
    assert part.local.shape == (48, 64)
    assert (part.sizes == 1).all()
    assert part.spans[:, 0].tolist() == [4] * 16 + [6] * 16 + [8] * 16
    want = tower.encode(torch.from_numpy(random_frames(3))).patches.flatten(0, 1)
    torch.testing.assert_close(part.local.float(), want, atol=5e-3, rtol=5e-3)


def test_towers_without_cls_or_text(tmp_path):
    siglip = load_tower(str(save_siglip_tower(tmp_path / "siglip")))
    table = frames_table({"frames": random_frames(4), "segments": [[0, 1, 2, 3]]})
    segment = encode_units(table, siglip, recipe_for(siglip)).to_pylist()[0]["segments"][0]
    assert segment["cls"] is None
    assert len(segment["embedding"]) == 64
    alone = load_tower(str(save_clip_tower(tmp_path / "clip", text=False)))
    segment = encode_units(table, alone, recipe_for(alone)).to_pylist()[0]["segments"][0]
    assert segment["embedding"] is segment["frame_embeddings"] is None
    assert segment["frames"] == [0, 1, 2, 3]
    assert len(segment["cls"]) == 5 * 64 * 2


def test_black_and_repeated_frames_are_stored(tower):
    black = np.zeros((8, 56, 56, 3), dtype=np.uint8)
    table = frames_table({"frames": black, "segments": [[0, 0, 0, 0], [1, 2, 3, 4]]})
    unit = encode_units(table, tower, recipe_for(tower)).to_pylist()[0]
    assert unit["error_code"] is None
    assert video_tokens(unit).prefix().isfinite().all()


def test_a_unit_that_overflows_fails_alone(tmp_path):
    folder = save_clip_tower(tmp_path)
    tower = load_tower(str(folder), "float16")
    with torch.no_grad():  # bright frames now overflow float16 and black ones do not
        tower._model.embeddings.patch_embedding.weight.abs_().mul_(3e4)
        tower._model.pre_layrnorm.bias.zero_()
    dark, bright = np.zeros((4, 56, 56, 3), np.uint8), np.full((4, 56, 56, 3), 255, np.uint8)
    tower.pixels = replace(tower.pixels, normalisation=replace(tower.pixels.normalisation, mean=(0.0,) * 3))
    numbers = [[0, 1, 2, 3]]
    table = frames_table({"frames": dark, "segments": numbers}, {"frames": bright, "segments": numbers})
    good, bad = encode_units(table, tower, recipe_for(tower, precision="float16")).to_pylist()
    assert good["error_code"] is None
    assert len(good["segments"]) == 1
    assert (bad["error_code"], bad["segments"]) == (ErrorCode.ENCODE_FAILED, [])
    assert "not finite" in bad["error"]
    assert "precision float32" in bad["error"]


def test_values_beyond_float16_are_refused_not_clamped(tower, monkeypatch):
    monkeypatch.setattr("longvlm.pipeline.vision.tokens.MAX_FLOAT16", 1e-3)
    table = frames_table({"frames": random_frames(4), "segments": [[0, 1, 2, 3]]})
    unit = encode_units(table, tower, recipe_for(tower)).to_pylist()[0]
    assert unit["error_code"] == ErrorCode.ENCODE_FAILED
    assert "does not fit into float16" in unit["error"]


def test_a_unit_with_too_few_bytes_fails_and_the_next_goes_on(tower):
    numbers = [[0, 1, 2, 3]]
    table = frames_table(
        {"frames": random_frames(3), "segments": numbers}, {"frames": random_frames(4), "segments": numbers}
    )
    bad, good = encode_units(table, tower, recipe_for(tower)).to_pylist()
    assert bad["error_code"] == ErrorCode.ENCODE_FAILED
    assert "28224 bytes are not [4, 56, 56, 3] of uint8" in bad["error"]
    assert good["error_code"] is None


def test_an_empty_batch_is_an_empty_batch(tower):
    encoded = encode_units(tables.FRAMES.empty_table(), tower, recipe_for(tower))
    assert encoded.schema.equals(tables.ENCODED)
    assert encoded.num_rows == 0


@pytest.mark.parametrize(
    ("ahead", "order", "seconds"),
    [
        (0, ["launch", "collect"] * 3, [3, 3, 3]),
        (1, ["launch", "launch", "collect", "launch", "collect", "collect"], [4, 3, 2]),  # never more than two at once
    ],
)
def test_a_batch_is_launched_before_the_one_before_is_collected(tower, monkeypatch, ahead, order, seconds):
    numbers = [[0, 1, 2, 3]]
    broken, failed = {"frames": random_frames(3), "segments": numbers}, {"error_code": "truncated", "error": "no."}
    first, second, third = ({"frames": random_frames(4, seed=i), "segments": numbers} for i in range(3))
    table = frames_table(first, broken, second, failed, third)
    want = encode_units(table, tower, recipe_for(tower)).to_pylist()
    events, now = [], [0.0]

    def noted(event, function, takes_s):
        def call(*args):
            events.append(event)
            now[0] += takes_s
            return function(*args)

        return call

    monkeypatch.setitem(FRAMES_PER_BATCH, "cpu", 4)
    monkeypatch.setitem(BATCHES_AHEAD, "cpu", ahead)
    monkeypatch.setattr(tower, "encode", noted("launch", tower.encode, 1.0))
    monkeypatch.setattr(Fetch, "wait", noted("collect", Fetch.wait, 2.0))
    monkeypatch.setattr("longvlm.pipeline.vision.encode.time.process_time", lambda: now[0])
    got = encode_units(table, tower, recipe_for(tower)).to_pylist()
    assert events == order
    assert [unit["video_id"] for unit in got] == [f"video{i}" for i in range(5)]
    assert [unit["error_code"] for unit in got] == [None, ErrorCode.ENCODE_FAILED, None, "truncated", None]
    # all the time that passes is some batch's, and none is two batches'
    assert [got[i]["encode_ms"] for i in range(5)] == [1000 * seconds[0], 0, 1000 * seconds[1], 0, 1000 * seconds[2]]
    for i in (0, 2, 4):
        tokens, expected = video_tokens(got[i]), video_tokens(want[i])
        torch.testing.assert_close(tokens.prefix(), expected.prefix(), atol=5e-3, rtol=5e-3)
        assert torch.equal(tokens.sizes, expected.sizes)


class QueuedOnly(TorchFunctionMode):
    """Fails where the host would have to wait until a device has taken a tensor of its memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            given = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            assert kwargs.get("non_blocking") or ("cpu" not in given and func is not torch.tensor), func
        return result


@pytest.mark.parametrize("save", [save_clip_tower, save_siglip_tower])
def test_a_batch_is_launched_without_asking_the_device_for_a_number(tmp_path, monkeypatch, save):
    tower = load_tower(str(save(tmp_path)), device="meta")  # which has shapes and no numbers: asking for one fails
    monkeypatch.setitem(FRAMES_PER_FORWARD, "meta", 4)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
    recipe = recipe_for(tower)
    with QueuedOnly():
        encoded = tower.encode(torch.from_numpy(random_frames(10)), recipe.feature_layer, recipe.num_global_layers)
        merged = merge_segments(encoded, pictures([[0, 5, 9, 12], [20, 21, 22, 23], [30, 31]]), recipe)
    assert [segment.local.shape for segment in merged] == [(8, 64)] * 3
    assert all(segment.embedding.device.type == "meta" for segment in merged)
