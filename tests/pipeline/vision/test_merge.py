import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from longvlm.pipeline.vision.merge import Merged, merge
from longvlm.schemas.recipe import halving_schedule, tokens_after
from support import GOLDENS

INDEX = GOLDENS / "merge_index.json"


def entries(kind, *, ties=False):
    """Pytest parameters for the entries of the reference's own index of its merges."""
    found = json.loads(INDEX.read_text())[kind] if INDEX.is_file() else []
    found = [entry for entry in found if entry.get("tie_sensitive", False) == ties]
    if not found:
        return [pytest.param(None, id=kind, marks=pytest.mark.skip(reason=f"no {kind} in {INDEX}"))]
    return [pytest.param(entry, id=str(entry.get("file", i))) for i, entry in enumerate(found)]


def golden_input(golden) -> torch.Tensor:
    frames = torch.from_numpy(golden["input"])
    per_segment = int(golden["clips"])
    return frames.reshape(len(frames) // per_segment, -1, frames.shape[-1])


def real_input(entry) -> torch.Tensor:
    """The frames [F, P, D] of a real-size case, which the index keeps as lines of Python and a hash."""
    made = {"torch": torch, "seed": entry["seed"]}
    exec(entry["recipe"], made)
    assert hashlib.sha256(made["x"].numpy().astype("<f4").tobytes()).hexdigest() == entry["input_sha256_f32le"]
    return made["x"]


def plain_merge(tokens, schedule, heads=16):
    """One segment's tokens and sizes by the definition, in float64; and how near to a tie any choice in it was.

    Token by token as LONGVLM.md section 4 has it, over the wide tokens themselves.
    """
    tokens, sizes, nearest = tokens.double(), torch.ones(len(tokens), dtype=torch.int64), float("inf")
    for step in schedule:
        metric = tokens.view(len(tokens), heads, -1).mean(dim=1)
        unit = metric / metric.norm(dim=1, keepdim=True)
        evens, odds = range(0, len(tokens), 2), range(1, len(tokens), 2)
        num_merged = min(step, len(odds))
        if num_merged < 1:
            continue
        scores = unit[evens] @ unit[odds].T
        ranked, order = scores.max(dim=1).values.sort(descending=True, stable=True)
        seconds = scores.sort(dim=1, descending=True).values[:, :2]
        gaps = [*(ranked[:-1] - ranked[1:]), *(seconds[:, 0] - seconds[:, 1] if len(odds) > 1 else [])]
        nearest = min([nearest, *map(float, gaps)])
        into = {odd: [odd] for odd in odds}
        for place in order[:num_merged].tolist():
            into[odds[int(scores[place].argmax())]].append(evens[place])
        groups = [[evens[place]] for place in order[num_merged:].tolist()] + list(into.values())
        sums = [(tokens[group] * sizes[group, None]).sum(dim=0) for group in groups]
        sizes = torch.stack([sizes[group].sum() for group in groups])
        tokens = torch.stack(sums) / sizes[:, None]
    return tokens, sizes, nearest


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
@pytest.mark.parametrize("entry", entries("cases"))
def test_small_goldens_step_by_step(entry, device, agree):
    golden = np.load(GOLDENS / entry["file"])
    inputs, steps = golden_input(golden), golden["r_list"].tolist()
    for taken in range(1, len(steps) + 1):
        merged = merge(inputs.to(device), steps[:taken], heads=int(golden["heads"]))
        agree(merged.tokens, golden[f"step{taken - 1}_tokens"], atol=1e-5)
        np.testing.assert_array_equal(merged.sizes.cpu(), golden[f"step{taken - 1}_sizes"][..., 0])
    agree(merged.tokens.flatten(0, 1), golden["output"], atol=1e-5)
    agree(merged.tokens.flatten(0, 1), golden["output_float64"].astype(np.float32), atol=1e-5)
    assert_invariants(inputs, merged)


@pytest.mark.parity
@pytest.mark.parametrize("entry", entries("real_size"))
def test_real_size_goldens(entry, device, agree):
    golden, frames = np.load(GOLDENS / entry["file"]), real_input(entry)
    num_segments = entry["out_shape"][0] // entry["step_tokens"][-1]
    inputs = frames.reshape(num_segments, -1, frames.shape[-1]).to(device)
    merged = merge(inputs, entry["r_list"][:1])
    for i, step in enumerate(entry["r_list"][1:]):
        np.testing.assert_array_equal(merged.sizes.cpu(), golden[f"step{i}_sizes"])
        merged = merge(merged.tokens, [step], sizes=merged.sizes, spans=merged.spans)
    step_by_step, merged = merged, merge(inputs, entry["r_list"])
    torch.testing.assert_close(step_by_step.tokens, merged.tokens, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(merged.sizes.cpu(), golden[f"step{len(entry['r_list']) - 1}_sizes"])
    local = merged.tokens.flatten(0, 1)
    assert list(local.shape) == entry["out_shape"]
    agree(local[golden["rows"]], golden["out_rows"], atol=1e-4)
    agree(local[:, :8], golden["out_col0_8"], atol=1e-4)
    agree(local.norm(dim=1), golden["out_token_norm"], atol=1e-4, rtol=1e-5)
    assert_invariants(inputs.cpu(), merged)


@pytest.mark.parity
@pytest.mark.parametrize("entry", entries("cases", ties=True))
def test_ties_keep_the_invariants(entry, device):
    golden = np.load(GOLDENS / entry["file"])
    inputs = golden_input(golden)
    merged = merge(inputs.to(device), golden["r_list"].tolist(), heads=int(golden["heads"]))
    assert merged.tokens.flatten(0, 1).shape == golden["output"].shape
    assert_invariants(inputs, merged)


@pytest.mark.parity
@pytest.mark.parametrize("entry", entries("errors"))
def test_widths_that_the_reference_refuses_are_refused(entry):
    if entry["dim"] % 16 == 0:
        pytest.skip("refused for its number of frames, which recipes check")
    with pytest.raises(ValueError, match="multiple of 16"):
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
