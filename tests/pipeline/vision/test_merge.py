import hashlib
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from near_ties import Merging, plain_merge
from reference_outputs import read_arrays, read_json

from longvlm.pipeline.vision.merge import Merged, MergeMetric, merge
from longvlm.schemas.recipe import METRIC_HEADS, halving_schedule, tokens_after
from support import GOLDENS, parameters

INDEX = GOLDENS / "merge_index.json"


def entries(kind, *, wanted):
    """Pytest parameters for the entries of the reference's own index of its merges that are wanted."""
    found = read_json(INDEX).get(kind, []) if INDEX.is_file() else []
    named = [(str(entry.get("file", i)), entry) for i, entry in enumerate(found) if wanted(entry)]
    return parameters(named, GOLDENS, f"{kind} in {INDEX.name}")


def is_tied(entry):
    return entry.get("tie_sensitive", False)


def golden_input(golden) -> torch.Tensor:
    frames = torch.from_numpy(golden["input"])
    per_segment = int(golden["clips"])
    return frames.reshape(len(frames) // per_segment, -1, frames.shape[-1])


@lru_cache(maxsize=1)
def real_input(recipe, seed, sha256) -> torch.Tensor:
    """The frames [F, P, D] of real-size cases, which the index keeps as lines of Python and a hash."""
    made = {"torch": torch, "seed": seed}
    exec(recipe, made)
    assert hashlib.sha256(made["x"].numpy().astype("<f4", copy=False)).hexdigest() == sha256
    return made["x"]


def assert_invariants(inputs, merged):
    merged = Merged(*(part.cpu() for part in (merged.tokens, merged.sizes, merged.spans)))
    num_tokens = inputs.shape[1]
    assert (merged.sizes.sum(dim=1) == num_tokens).all()
    weighted = (merged.tokens.double() * merged.sizes[..., None]).sum(dim=1)
    torch.testing.assert_close(weighted, inputs.double().sum(dim=1), atol=2e-4, rtol=1e-4)
    first, last = merged.spans.unbind(-1)
    assert (first >= 0).all()
    assert (last < num_tokens).all()
    assert (last - first + 1 >= merged.sizes).all()


@given(
    num_segments=st.integers(1, 3),
    num_tokens=st.integers(1, 40),
    steps=st.lists(st.integers(0, 20), max_size=4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_and_sizes_are_those_of_the_definition(device, agree, num_segments, num_tokens, steps, seed):
    inputs = torch.randn(num_segments, num_tokens, 128, generator=torch.Generator().manual_seed(seed))
    wanted = [plain_merge(segment, steps) for segment in inputs]
    assume(min(nearest for *_, nearest in wanted) > 1e-5)
    merged = merge(inputs.to(device), steps)
    for (tokens, sizes, _), found_tokens, found_sizes in zip(wanted, merged.tokens, merged.sizes, strict=True):
        assert torch.equal(found_sizes.cpu(), sizes)
        agree(found_tokens, tokens.float(), atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("entry", entries("cases", wanted=lambda entry: not is_tied(entry)))
def test_small_goldens_step_by_step(entry, device, agree):
    golden = read_arrays(GOLDENS / entry["file"])
    inputs, steps, heads = golden_input(golden), golden["r_list"].tolist(), int(golden["heads"])
    for taken in range(1, len(steps) + 1):
        merged, merging = (
            merge(inputs.to(device), steps[:taken], metric=MergeMetric(heads)),
            Merging(inputs, steps[:taken], heads),
        )
        merging.hold(agree, merged.tokens, golden[f"step{taken - 1}_tokens"], atol=1e-5)
        merging.hold(agree, merged.sizes, golden[f"step{taken - 1}_sizes"][..., 0])
    merging.hold(agree, merged.tokens.flatten(0, 1), golden["output"], atol=1e-5)
    merging.hold(agree, merged.tokens.flatten(0, 1), golden["output_float64"], atol=1e-5)
    assert_invariants(inputs, merged)


@pytest.mark.parity
@pytest.mark.parametrize("entry", entries("real_size", wanted=lambda _: True))
def test_real_size_goldens(entry, device, agree):
    golden = read_arrays(GOLDENS / entry["file"])
    frames, steps = real_input(entry["recipe"], entry["seed"], entry["input_sha256_f32le"]), entry["r_list"]
    num_segments = entry["out_shape"][0] // entry["step_tokens"][-1]
    inputs = frames.reshape(num_segments, -1, frames.shape[-1]).to(device)
    merged = merge(inputs, [])
    for i, step in enumerate(steps):
        merged = merge(merged.tokens, [step], sizes=merged.sizes, spans=merged.spans)
        Merging(inputs, steps[: i + 1]).hold(agree, merged.sizes, golden[f"step{i}_sizes"])
    merging, step_by_step, merged = Merging(inputs, steps), merged, merge(inputs, steps)
    merging.hold(agree, step_by_step.tokens, merged.tokens, atol=1e-5, rtol=1e-5)
    merging.hold(agree, merged.sizes, golden[f"step{len(steps) - 1}_sizes"])
    local = merged.tokens.flatten(0, 1).cpu()
    assert list(local.shape) == entry["out_shape"]
    first = golden["out_col0_8"]
    merging.hold(agree, local[:, : first.shape[1]], first, atol=1e-4)
    merging.hold(agree, local.norm(dim=1), golden["out_token_norm"], atol=1e-4, rtol=1e-5)
    whole_rows = local.clone()
    whole_rows[golden["rows"]] = torch.from_numpy(golden["out_rows"])
    merging.hold(agree, local, whole_rows, atol=1e-4)
    assert_invariants(inputs.cpu(), merged)


@pytest.mark.parity
@pytest.mark.parametrize("entry", entries("cases", wanted=is_tied))
def test_ties_keep_the_invariants(entry, device):
    golden = read_arrays(GOLDENS / entry["file"])
    inputs = golden_input(golden)
    merged = merge(inputs.to(device), golden["r_list"].tolist(), metric=MergeMetric(int(golden["heads"])))
    assert merged.tokens.flatten(0, 1).shape == golden["output"].shape
    assert_invariants(inputs, merged)


@pytest.mark.parity
@pytest.mark.parametrize("entry", entries("errors", wanted=lambda entry: entry["dim"] % METRIC_HEADS))
def test_widths_that_the_reference_refuses_are_refused(entry):
    with pytest.raises(ValueError, match=f"multiple of {METRIC_HEADS}"):
        merge(torch.randn(1, 8, entry["dim"]), [4])


@given(
    num_segments=st.integers(1, 3),
    num_tokens=st.integers(1, 70),
    steps=st.lists(st.integers(-1, 40), max_size=6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_any_schedule_keeps_sizes_sums_and_spans(device, num_segments, num_tokens, steps, seed):
    inputs = torch.randn(num_segments, num_tokens, 32, generator=torch.Generator().manual_seed(seed))
    schedule = [max(step, 0) for step in steps]
    merged = merge(inputs.to(device), schedule)
    assert merged.tokens.shape == (num_segments, tokens_after(num_tokens, tuple(schedule)), 32)
    assert_invariants(inputs, merged)


@given(num_tokens=st.integers(81, 400), middle=st.integers(30, 80), keep=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_continuing_from_a_stored_merge_is_the_same_as_going_on(num_tokens, middle, keep, seed):
    inputs = torch.randn(2, num_tokens, 64, generator=torch.Generator().manual_seed(seed))
    first, second = halving_schedule(num_tokens, middle), halving_schedule(middle, keep)
    direct = merge(inputs, first + second)
    stored = merge(inputs, first)
    continued = merge(stored.tokens, second, sizes=stored.sizes, spans=stored.spans)
    torch.testing.assert_close(continued.tokens, direct.tokens, atol=1e-5, rtol=1e-5)
    assert torch.equal(continued.sizes, direct.sizes)
    assert torch.equal(continued.spans, direct.spans)


def test_eighty_tokens_continue_to_the_papers_thirty():
    inputs = torch.randn(2, 2560, 64, generator=torch.Generator().manual_seed(3))
    direct = merge(inputs, halving_schedule(2560, 30))
    stored = merge(inputs, halving_schedule(2560, 80))
    continued = merge(stored.tokens, [40, 10], sizes=stored.sizes, spans=stored.spans)
    torch.testing.assert_close(continued.tokens, direct.tokens, atol=1e-5, rtol=1e-5)
    assert torch.equal(continued.sizes, direct.sizes)
    assert torch.equal(continued.spans, direct.spans)


def test_survivors_of_halving_are_anchors_in_their_order():
    merged = merge(torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)), [32, 16])
    first, last = merged.spans[0].unbind(-1)
    anchors = torch.arange(3, 64, 4)
    assert ((first <= anchors) & (anchors <= last)).all()


def test_spans_are_given_in_the_callers_positions():
    inputs = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.01, 1]]).repeat(1, 16)[None]
    frame_numbers = torch.tensor([[7, 7, 90, 300]])
    merged = merge(inputs, [2], spans=torch.stack([frame_numbers, frame_numbers], dim=-1))
    assert merged.spans.tolist() == [[[7, 7], [90, 300]]]
    assert merged.sizes.tolist() == [[2, 2]]


def test_tokens_of_zeros_and_whole_black_segments_stay_finite(device):
    inputs = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(1))
    inputs[0, ::3] = 0
    inputs[1] = 0
    merged = merge(inputs.to(device), [20, 7, 5])
    assert merged.tokens.isfinite().all()
    assert_invariants(inputs, merged)
    assert torch.equal(merged.tokens[2], merge(inputs[2:].to(device), [20, 7, 5]).tokens[0])


def test_a_nan_stays_in_its_segment(device):
    inputs = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(2)).to(device)
    clean = merge(inputs, [20, 7])
    inputs[0, 5, 3] = torch.nan
    merged = merge(inputs, [20, 7])
    assert merged.tokens[0].isnan().any()
    assert torch.equal(merged.tokens[1], clean.tokens[1])


def test_segments_do_not_depend_on_how_many_are_merged_at_once(monkeypatch, device):
    inputs = torch.randn(7, 96, 128, generator=torch.Generator().manual_seed(4)).to(device)
    together = merge(inputs, [48, 20])
    for limit in ("MAX_SCORES_CPU", "MAX_SCORES_GPU"):
        monkeypatch.setattr(f"longvlm.pipeline.vision.merge.{limit}", 48 * 48 * 3)
    blocked = merge(inputs, [48, 20])
    assert torch.equal(together.tokens, blocked.tokens)
    assert torch.equal(together.sizes, blocked.sizes)
