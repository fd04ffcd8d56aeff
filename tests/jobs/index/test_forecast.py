"""Dry runs of the index job: what there is to do, what it would take, and that nothing is left behind."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import longvlm.jobs.index.run
from clips import write_clip
from longvlm.jobs.cli import main
from longvlm.jobs.cluster.resources import for_index
from longvlm.jobs.index.forecast import _segments, segment_bytes_of
from longvlm.jobs.index.projection import CostModel, failure_shares, project, wilson
from longvlm.pipeline.source import corpus
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.vision.tokens import SegmentTokens
from longvlm.schemas.recipe import IndexRecipe, tiny
from longvlm.schemas.tower import TowerSpec

FIGURES = ("video_hours", "store_bytes", "decode_cpu_hours", "encode_hours", "wall_hours", "cpus_per_encoder", "cost")


def run(*args):
    return CliRunner().invoke(main, ["index", *map(str, args)], catch_exceptions=False)


def forecast(*args):
    shown = run(*args, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout.splitlines()[-1])


def everything_below(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_segments_bytes_are_those_of_its_blobs(dtype):
    for plain in (
        tiny(TowerSpec("t", "w", 4, (4, 4), 64, 56, has_cls=True, search_dim=32)),
        tiny(TowerSpec("t", "w", 0, (4, 4), 64, (64, 64), has_cls=False, search_dim=None, has_positions=True)),
    ):
        recipe = replace(plain, dtype=dtype)
        num_tokens, num_global = recipe.tokens_per_segment, recipe.num_global_layers
        row = SegmentTokens(
            *(0, 4, torch.zeros(num_tokens, 64), torch.ones(num_tokens), torch.zeros(num_tokens, 2)),
            torch.zeros(num_global, 64) if num_global else None,
            torch.zeros(num_tokens, 3, dtype=torch.float64) if recipe.tower.has_positions else None,
        ).to_row(dtype)
        blobs = sum(len(value) for value in row.values() if isinstance(value, bytes))
        width, num_frames = recipe.tower.search_dim or 0, recipe.frames_per_segment
        vectors = 4 * width + num_frames * width  # of the segment in float32, and of its frames in int8
        assert segment_bytes_of(recipe) == blobs + vectors + num_frames * 2 * 8  # each frame's number and time


def test_frames_that_are_spread_are_as_many_in_a_long_video_as_there_may_be():
    tower = TowerSpec("t", "w", 0, (4, 4), 64, 56, has_cls=False, search_dim=None)
    spread = IndexRecipe("s", tower, "spread", 4, 8, num_global_layers=0, max_frames=64, frames_per_s=1.0)
    assert _segments(spread, video_s=3600.0, num_videos=10) == 10 * 64 / 4 + 5
    assert _segments(spread, video_s=100.0, num_videos=10) == 100 / 4 + 5


def test_a_new_store_is_counted_for_and_not_made(tmp_path, clips, model, monkeypatch):
    monkeypatch.delattr(longvlm.jobs.index.run, "open_executor")  # no Ray is asked for
    found = forecast(clips, "--store", tmp_path / "s", "--model", model, "--recipe", "tiny", "--limit", 9)
    assert (found["listed"], found["work"], found["not_attempted"]) == (12, 9, 3)
    assert (found["measured_on"], found["video_hours"], found["store_bytes"]) == (None, None, None)
    shown = run(clips, "--store", tmp_path / "s", "--model", model, "--recipe", "tiny", "--dry-run")
    assert "--dry-run --sample 50" in shown.output
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_tells_what_the_rest_takes(tmp_path, indexed, clips):
    store = tmp_path / "store"
    shutil.copytree(indexed, store)
    before = everything_below(store)
    more = tmp_path / "more"
    more.mkdir()
    for i in range(4):
        shutil.copyfile(clips / f"clip-{i:02}.mp4", more / f"{i}.mp4")
    found = forecast(more, "--store", store)
    assert (found["work"], found["measured_on"]) == (4, "store")
    known = {path.name: path.stat().st_size for path in clips.iterdir()}
    per_byte = sum(1 + i % 4 for i in range(12)) / sum(known.values())
    video_s = per_byte * sum(path.stat().st_size for path in more.iterdir())
    assert found["video_hours"] * 3600 == pytest.approx(video_s, rel=1e-3)
    with catalog.connect(Store.open(str(store)).pin()) as con:
        sums = "SELECT sum(decode_ms), sum(encode_ms), sum(duration_s), sum(num_segments) FROM videos"
        decode_ms, encode_ms, known_s, segments = con.execute(sums).fetchone()
    assert found["decode_cpu_hours"] * 3.6e6 == pytest.approx(decode_ms * video_s / known_s, rel=0.02)
    assert found["encode_hours"] * 3.6e6 == pytest.approx(encode_ms * video_s / known_s, rel=0.02)
    on_disk = sum(path.stat().st_size for table in ("tokens", "segments") for path in store.glob(f"{table}/*.parquet"))
    assert found["store_bytes"] == pytest.approx(on_disk * video_s / known_s, rel=1e-3)
    assert segments > 0
    assert "rates of this recipe" in run(more, "--store", store, "--dry-run").output
    assert everything_below(store) == before


def test_another_recipe_has_known_lengths_and_no_rates(indexed, clips):
    found = forecast(clips, "--store", indexed, "--recipe", "paper", "--restale")
    assert (found["work"], found["measured_on"], found["decode_cpu_hours"]) == (12, "source", None)
    assert found["video_hours"] * 3600 == pytest.approx(30)
    assert found["store_bytes"] == pytest.approx(12 * 10 * (30 * (64 * 2 + 10) + 5 * 64 * 2 + 32 * 4 + 4000), rel=0.5)
    assert forecast(clips, "--store", indexed, "--recipe", "paper")["stale"] == 12
    assert forecast(clips, "--store", indexed)["unchanged"] == 12


def test_what_prune_would_delete_is_counted(source, indexed):
    (source / "clip-00.mp4").unlink()
    assert forecast(source, "--store", indexed)["gone"] == 1
    assert forecast(source, "--store", indexed, "--prune")["would_delete"] == 1
    with catalog.connect(Store.open(indexed).pin(("videos",))) as con:
        assert con.execute("SELECT count(*) FROM ledger_videos WHERE status = 'deleted'").fetchone() == (0,)


def test_a_sample_is_watched_projected_and_removed(tmp_path, clips, model):
    source, store = tmp_path / "v", tmp_path / "deep" / "store"
    shutil.copytree(clips, source)
    (source / "bad.mp4").write_bytes(b"not a video" * 1000)
    before = everything_below(tmp_path)
    command = (source, "--store", store, "--model", model, "--recipe", "tiny")
    all_of_it = forecast(*command, "--sample", 50, "--cpu-price", 0.5)
    assert (all_of_it["work"], all_of_it["sampled"], all_of_it["measured_on"]) == (13, 13, "sample")
    assert all_of_it["video_hours"] * 3600 == pytest.approx(30, rel=1e-3)
    assert all(all_of_it["intervals"][name] == [all_of_it[name]] * 2 for name in FIGURES)  # nothing left to chance
    assert all_of_it["failures"]["not_a_video"]["videos"] == 1
    assert all_of_it["failures"]["any"] == all_of_it["failures"]["not_a_video"]
    assert all_of_it["read_bytes"] is None  # nothing came from the network
    assert all_of_it["cost"] >= 0.5 * all_of_it["decode_cpu_hours"]
    assert everything_below(tmp_path) == before

    some = forecast(*command, "--sample", 6, "--seed", 3)
    assert (some["work"], some["sampled"]) == (13, 6)
    assert "cost" not in some
    for name, (low, high) in some["intervals"].items():
        assert low <= some[name] <= high, name
    shown = run(*command, "--dry-run", "--sample", 6).output
    assert "90 % intervals" in shown
    assert "--cpu-price" in shown


def test_a_sample_leaves_the_store_as_it_is(tmp_path, indexed):
    store, source = tmp_path / "store", tmp_path / "v"
    shutil.copytree(indexed, store)
    source.mkdir()
    write_clip(source / "new.mp4", 50)
    before = {path: at for path, at in everything_below(store).items() if path != store}
    found = forecast(source, "--store", store, "--sample", 3)
    assert (found["sampled"], found["failures"]["any"]["videos"]) == (1, 0)
    assert found["video_hours"] * 3600 == pytest.approx(2, rel=1e-3)
    assert {path: at for path, at in everything_below(store).items() if path != store} == before


def test_a_sample_of_a_bucket_leaves_nothing_there(s3, clips, model):
    for i in range(3):
        s3.upload_file(str(clips / f"clip-{i:02}.mp4"), "bucket", f"v/{i}.mp4")
    command = ("s3://bucket/v", "--store", "s3://bucket/index", "--model", model, "--recipe", "tiny")
    found = forecast(*command, "--sample", 2)
    assert (found["work"], found["sampled"]) == (3, 2)
    sizes = [(clips / f"clip-{i:02}.mp4").stat().st_size for i in range(3)]
    assert found["read_bytes"] == pytest.approx(sum(sizes), abs=1)  # small objects are read whole
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket="bucket")["Contents"]]
    assert keys == ["v/0.mp4", "v/1.mp4", "v/2.mp4"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sample", 5), "go with --dry-run"),
        (("--cpu-price", 1), "go with --dry-run"),
        (("--seed", 1), "go with --dry-run"),
        (("--dry-run", "--gpu-price", 1), "go with --sample"),
        (("--dry-run", "--prune", "--limit", 1), "--prune with --limit"),
    ],
)
def test_wrong_combinations_are_sentences(tmp_path, clips, model, options, says):
    shown = run(clips, "--store", tmp_path / "s", "--model", model, *options)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert says in shown.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--dry-run", "--sample", 3)])
def test_a_listing_that_breaks_off_leaves_nothing(tmp_path, clips, model, monkeypatch, options):
    def breaks_off(fs, path, _):
        yield from ([info] for info in fs.ls(path, detail=True)[:3])
        raise TimeoutError("read timed out")

    monkeypatch.setattr(corpus, "pages_below", breaks_off)
    shown = run(clips, "--store", tmp_path / "s", "--model", model, "--recipe", "tiny", *options)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "cannot be listed: TimeoutError: read timed out" in shown.stderr
    assert list(tmp_path.iterdir()) == []


def made_up(number, seed=0):
    """Videos of 1 MB a minute, about, some of which fail."""
    random = np.random.default_rng(seed)
    minutes = random.lognormal(1, 0.8, number)
    return [
        {
            "error_code": "truncated" if i % 10 == 0 else None,
            "size_bytes": int(m * 1e6 * random.uniform(0.8, 1.2)),
            "video_s": m * 60,
            "segments": round(m * 6),
            "decode_s": m * 2,
            "encode_s": m * 0.1,
        }
        for i, m in enumerate(minutes)
    ]


GPU = CostModel(for_index({"CPU": 32, "GPU": 2}, 10_000), 160_000.0, 1.5, 1.1, 1.0, gpu_price=3.0, cpu_price=0.04)


def test_projections_of_samples_hold_what_all_of_it_is():
    rows = made_up(10_000)
    work = {"videos": len(rows), "size_bytes": sum(row["size_bytes"] for row in rows), "num_unknown_sizes": 0}
    truth = sum(row["video_s"] for row in rows) / 3600
    random, hits = np.random.default_rng(1), {"bytes": 0, "videos": 0}
    for _ in range(50):
        sample = [rows[i] for i in random.choice(len(rows), 50, replace=False)]
        for by, unknown in (("bytes", 0), ("videos", 1)):
            values, intervals = project(sample, {**work, "num_unknown_sizes": unknown}, GPU, 0)
            low, high = intervals["video_hours"]
            assert low <= values["video_hours"] <= high
            hits[by] += low <= truth <= high
    assert hits["bytes"] >= 38  # of 45 expected
    assert hits["videos"] >= 38


def test_figures_follow_from_the_sums():
    figures = {name: value[0] for name, value in GPU.figures(np.array([[7200.0, 720, 3600, 180]])).items()}
    assert (figures["video_hours"], figures["store_bytes"], figures["cpus_per_encoder"]) == (2, 720 * 160_000, 20)
    assert figures["cost"] == pytest.approx(0.04 + 0.05 * 3)
    assert figures["wall_hours"] == pytest.approx(1.5 / GPU.resources.decoders)
    cpu = CostModel(for_index({"CPU": 8}, 10), 1.0, 1.0, 1.0, 2.0, gpu_price=None, cpu_price=1.0)
    assert cpu.figures(np.array([[0.0, 0, 3600, 1800]]))["cost"][0] == pytest.approx(2)


def test_a_sample_of_nothing_but_failures_has_no_ratio():
    rows = [{"size_bytes": 0, "video_s": 0.0, "segments": 0, "decode_s": 0.0, "encode_s": 0.0} for _ in range(3)]
    values, intervals = project(rows, {"videos": 9, "size_bytes": 0, "num_unknown_sizes": 0}, GPU, 0)
    assert values["cpus_per_encoder"] is None
    assert "cpus_per_encoder" not in intervals
    json.dumps([values, intervals], allow_nan=False)


def test_shares_of_failures_have_intervals_even_where_none_failed():
    assert wilson(0, 50)[0] == 0
    assert wilson(0, 50)[1] == pytest.approx(0.0513, abs=1e-3)
    bounds = [wilson(n, 50)[1] for n in range(51)]
    assert all(a <= b for a, b in pairwise(bounds))
    found = failure_shares(["truncated", "deadline", "truncated", *[None] * 7])
    assert list(found) == ["any", "truncated", "deadline"]
    assert found["any"]["share"] == 0.3
    assert found["truncated"]["share"] + found["deadline"]["share"] == pytest.approx(0.3)
