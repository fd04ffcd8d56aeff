import json
import os
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import stores
import torch
from reference_outputs import clip_cases
from stores import rows

import longvlm.jobs.index.run
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.index import stages
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import video_id
from support import lent


def order_for(source, store, model=None, **settings):
    return IndexOrder(Source(str(source)), str(store), model=model, **{"recipe": "tiny", **settings})


def assert_whole(store, num_videos):
    """Every video once, every token of a live video readable, every segment there."""
    videos = rows(store, "SELECT write_id, num_segments FROM videos WHERE status = 'indexed'")
    assert len(videos) == len({video["write_id"] for video in videos}) == num_videos
    tokens = read_tokens(Store.open(str(store)).pin(), [video["write_id"] for video in videos])
    found = Counter(tokens["write_id"].to_pylist())
    segments = {r["write_id"]: r["n"] for r in rows(store, "SELECT write_id, count(*) AS n FROM segments GROUP BY ALL")}
    for video in videos:
        assert found[video["write_id"]] == segments[video["write_id"]] == video["num_segments"]


def test_a_folder_becomes_a_store(indexed, clips):
    assert_whole(indexed, 12)
    (video,) = rows(indexed, "FROM videos WHERE uri LIKE '%clip-03.mp4'")
    assert video["uri"] == str(clips / "clip-03.mp4")
    assert (video["num_frames"], video["duration_s"], video["width"], video["height"]) == (100, 4.0, 96, 64)
    assert (video["codec"], video["decoder"], video["attempts"], video["num_segments"]) == ("h264", "pyav", 1, 2)
    assert video["decode_ms"] > 0
    assert video["encode_ms"] > 0
    (run,) = rows(indexed, "FROM runs")
    assert run["job"] == "index"


def test_a_video_that_another_run_indexes_during_the_listing_is_not_pruned(tmp_path, indexed, clips, monkeypatch):
    shutil.copytree(indexed, tmp_path / "store")
    plain = longvlm.jobs.index.run.spool_source

    def listed_before(*args):
        number = plain(*args)
        stores.index(Store.open(str(tmp_path / "store")), ["late"], source=str(clips))
        return number

    monkeypatch.setattr(longvlm.jobs.index.run, "spool_source", listed_before)
    report = run_index(order_for(clips, tmp_path / "store", prune=True))
    assert (report.counts.deleted, report.counts.gone) == (0, 0)
    assert len(rows(tmp_path / "store", "FROM live_videos WHERE uri LIKE '%late%'")) == 1
    monkeypatch.setattr(longvlm.jobs.index.run, "spool_source", plain)
    assert run_index(order_for(clips, tmp_path / "store", prune=True)).counts.deleted == 1


def test_a_store_remembers_whether_segments_have_thumbnails(tmp_path, clips, model):
    source, store = tmp_path / "v", str(tmp_path / "store")
    source.mkdir()
    shown = []
    for name, asked in (("clip-00", None), ("clip-01", False), ("clip-02", None), ("clip-03", True)):
        shutil.copy(clips / f"{name}.mp4", source)
        run_index(IndexOrder(Source(str(source)), store, model, "tiny", thumbnails=asked, ray_address=IN_PROCESS))
        kept = rows(store, f"SELECT thumbnail FROM segments WHERE uri LIKE '%{name}%'")
        assert kept
        shown.append({row["thumbnail"] and row["thumbnail"][:3] for row in kept})
    assert shown == [{b"\xff\xd8\xff"}, {None}, {None}, {b"\xff\xd8\xff"}]
    assert [recipe.active for recipe in Store.open(store).recipes()] == [True]


def test_another_recipe_waits_to_be_asked_for_and_to_be_promoted(tmp_path, indexed, clips):
    store = tmp_path / "store"
    shutil.copytree(indexed, store)
    asked = order_for(clips, store, recipe="long")
    assert run_index(asked).counts.stale == 12
    restaled = run_index(order_for(clips, store, recipe="long", restale=True))
    assert restaled.counts.indexed == 12
    assert rows(store, "SELECT DISTINCT num_segments FROM videos ORDER BY 1") == [
        {"num_segments": 1},
        {"num_segments": 2},
    ]
    Store.open(str(store)).promote("long")
    assert rows(store, "SELECT DISTINCT num_segments FROM videos") == [{"num_segments": 1}]
    assert_whole(store, 12)


@pytest.mark.usefixtures("on_ray")
def test_workers_that_are_killed_lose_nothing_and_a_video_that_kills_every_encoder_fails_alone(
    tmp_path, clips, model, monkeypatch
):
    """One run has all of them die; what was at work beside the video goes on."""
    poison = video_id(str(clips / "clip-00.mp4"))  # which comes first, before anything is encoded
    killed = tmp_path / "writer-killed"

    class DiesAfterItsSecondShard(stages.Write):
        calls = 0

        def __call__(self, encoded):
            outcomes = super().__call__(encoded)
            self.calls += 1
            if self.calls == 2 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return outcomes

    class DiesOfOne(stages.Encode):
        """Loads PyTorch and the tower when it has something to encode: a worker that only dies does without."""

        def __init__(self, *args):
            stages.MAX_ATTEMPTS = 2  # in this worker
            self.args, self.tower = args, None
            self.stage = stages.StageReporter("encode", args[1])

        def _encode(self, frames, keys):
            if poison in frames["video_id"].to_pylist():
                with self.stage.work(keys):
                    (tmp_path / f"died-of-{len(keys)}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            if self.tower is None:
                super().__init__(*self.args)
            return super()._encode(frames, keys)

    monkeypatch.setattr(longvlm.jobs.index.run, "Write", DiesAfterItsSecondShard)
    monkeypatch.setattr(longvlm.jobs.index.run, "Encode", DiesOfOne)
    one = {"decoders": 1, "decoder_cpus": 1.5}  # leaves no room for a second
    changed = with_resources(units_per_shard=2, units_per_forward=12, **one)
    monkeypatch.setattr(longvlm.jobs.index.run, "for_index", changed)
    report = run_index(order_for(clips, tmp_path / "store", model))
    assert killed.exists()
    assert {path.name for path in tmp_path.glob("died-of-*")} == {"died-of-12", "died-of-1"}
    assert report.counts.indexed == 11
    assert report.counts.failures == {"lost": 1}
    assert_whole(tmp_path / "store", 11)


def with_resources(**changes):
    """The job's own choice of resources with some numbers changed."""
    from dataclasses import replace

    from longvlm.jobs.cluster.resources import for_index

    return lambda *facts, **options: replace(for_index(*facts, **options), **changes)


def test_an_operator_that_breaks_stops_the_run_and_keeps_what_was_done(tmp_path, clips, model, monkeypatch):
    """What breaks on Ray is told the same way: see the executor."""

    class Breaks(stages.Encode):
        def _encode(self, frames, keys):
            if 100 in frames["num_frames"].to_pylist():
                raise OSError(28, "No space left on device")
            return super()._encode(frames, keys)

    monkeypatch.setattr(longvlm.jobs.index.run, "Encode", Breaks)
    monkeypatch.setattr(longvlm.jobs.index.run, "for_index", with_resources(units_per_shard=2, units_per_forward=1))
    report = run_index(order_for(clips, tmp_path / "store", model))
    assert report.stopped == "OSError: [Errno 28] No space left on device"
    assert (report.counts.indexed, report.counts.not_attempted) == (2, 10)
    assert_whole(tmp_path / "store", 2)
    monkeypatch.undo()
    again = run_index(order_for(clips, tmp_path / "store", ray_address=IN_PROCESS))
    assert (again.counts.indexed, again.counts.unchanged) == (10, 2)
    assert_whole(tmp_path / "store", 12)


def test_a_broken_writer_call_is_never_seen(tmp_path, indexed):
    """Shards that nobody committed are in the folder and in no view."""
    store = tmp_path / "store"
    shutil.copytree(indexed, store)
    before = rows(store, "SELECT count(*) AS n FROM tokens")
    for shard in (store / "tokens").glob("*.parquet"):
        shutil.copyfile(shard, store / "tokens" / f"orphan-{shard.name}")
    assert rows(store, "SELECT count(*) AS n FROM tokens") == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": "nowhere"}, "nowhere"),
        ({"source": "empty"}, "video"),
        ({"model": None}, "--model"),
        ({"model": "broken"}, "config.json"),
        ({"recipe": "paperr"}, "paper, long, tiny"),
        ({"recipe": "thirtyone.toml"}, "ends at 30"),
        pytest.param(
            {"decode_device": "cuda"},
            "no GPU to decode with",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_input_is_a_sentence_and_writes_nothing(tmp_path, clips, model, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    schedule = "merge_schedule = [80, 40, 10]\ntokens_per_segment = 31\n"
    (tmp_path / "thirtyone.toml").write_text('base = "paper"\n' + schedule)
    order = order_for(**{"source": clips, "store": tmp_path / "store", "model": model, **settings})
    with pytest.raises(InputError, match=says):
        run_index(order)
    assert not (tmp_path / "store").exists()


@pytest.mark.parity
@pytest.mark.parametrize("reference", clip_cases(lambda clip: clip.video, "tower outputs of a video file"))
def test_a_video_of_the_reference_goes_through_the_store_unharmed(tmp_path, reference):
    """From the file, through decoder, tower, merge and fp16 storage: cosine above 0.999 with the reference's output."""
    made_by = reference.recipe
    recipe = {
        "base": "paper",
        "num_segments": made_by.num_segments,
        "frames_per_segment": made_by.frames_per_segment,
        "tokens_per_segment": made_by.tokens_per_segment,
        "merge_schedule": made_by.merge_schedule,
        "num_global_layers": made_by.num_global_layers,
        "resize": made_by.resize,
        "precision": made_by.precision,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    order = order_for(
        reference.video, tmp_path / "store", str(reference.folder / "model"), recipe=str(tmp_path / "recipe.json")
    )
    assert run_index(order).counts.indexed == 1
    (row,) = rows(tmp_path / "store", "SELECT write_id FROM videos")
    prefix = from_arrow(read_tokens(Store.open(str(tmp_path / "store")).pin(), [row["write_id"]])).prefix()
    expected = torch.from_numpy(np.concatenate([reference.arrays["memory"], reference.arrays["local"]]))
    is_far = torch.cosine_similarity(prefix, expected, dim=-1) <= 0.999
    is_far_global, is_far_local = is_far.split([made_by.num_global_layers, len(reference.arrays["local"])])
    assert not is_far_global.any()
    settled = reference.merging.settled(is_far_local.view(reference.merging.shape))
    assert not is_far_local[settled.flatten()].any()


@pytest.mark.corpus
def test_real_clips_good_and_bad_in_one_run(tmp_path, videos, model):
    source = tmp_path / "videos"
    source.mkdir()
    small = (
        [clip for clip in lent(videos / kind).iterdir() if clip.stat().st_size < 700_000] for kind in ("good", "bad")
    )
    good, bad = map(sorted, small)  # the large ones are decoded in tests/pipeline/decode/test_video.py
    for clip in [*good, *bad]:
        (source / clip.name).symlink_to(clip)
    report = run_index(order_for(source, tmp_path / "store", model, recipe="paper"))
    assert report.counts.listed == len(good) + len(bad)
    status = {r["uri"].rpartition("/")[2]: r for r in rows(tmp_path / "store", "SELECT uri, status, error FROM videos")}
    assert {status[clip.name]["status"] for clip in good} == {"indexed"}
    for clip in bad:
        assert status[clip.name]["status"] == "indexed" or status[clip.name]["error"].endswith(".")
    hopeless = ("zero_bytes", "random_bytes", "text_", "truncated_no_moov", "encrypted", "header_only")
    assert {status[clip.name]["status"] for clip in bad if clip.name.startswith(hopeless)} <= {"failed"}
    assert_whole(tmp_path / "store", report.counts.indexed)
