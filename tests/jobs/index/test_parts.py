"""Long videos that are shared out among decoders, through the whole index job."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
from stores import rows

import longvlm.jobs.index.run
from clips import write_clip
from longvlm.jobs.cluster import resources
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.index import stages
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory):
    """Two videos of twelve units each, and one of a single unit."""
    folder = tmp_path_factory.mktemp("videos")
    for name, num_frames in (("a", 300), ("b", 299), ("short", 25)):
        write_clip(folder / f"{name}.mp4", num_frames, gop=20)
    return folder


@pytest.fixture(scope="module")
def order(tmp_path_factory, long_videos, model):
    """Gives an order to index a folder, or these videos, into a store."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.json"
    recipe.write_text(json.dumps({"base": "tiny", "segment_s": 0.5, "frames_per_segment": 50}))

    def order(store, source=long_videos, **settings):
        return IndexOrder(Source(str(source)), str(store), model, str(recipe), **settings)

    return order


@pytest.fixture(scope="module")
def watched_alone(tmp_path_factory, order):
    """What is stored of the videos where one decoder watches each."""
    store = tmp_path_factory.mktemp("alone") / "store"
    alone = run_index(order(store, ray_address=IN_PROCESS))
    assert alone.counts.indexed == 3
    assert "parts" not in alone.stages
    return tokens_of(store)


@pytest.fixture
def shared(monkeypatch):
    """Whatever more is to be decoded than two units is left to others, in parts of about three."""
    plain = longvlm.jobs.index.run.for_index
    changed = {"long_decode_s": 0.0, "units_per_shard": 4, "videos_per_block": 1}
    monkeypatch.setattr(
        longvlm.jobs.index.run, "for_index", lambda *facts, **options: replace(plain(*facts, **options), **changed)
    )
    monkeypatch.setattr(resources, "PART_DECODE_S", 1e-9)
    monkeypatch.setattr(resources, "MAX_PARTS", 4)


def tokens_of(store):
    """What is stored of each video, whatever its write is called."""
    videos = rows(store, "SELECT uri, write_id, num_frames, num_segments FROM live_videos ORDER BY uri")
    found = {}
    for video in videos:
        table = read_tokens(Store.open(str(store)).pin(), [video["write_id"]]).sort_by("segment")
        assert table["segment"].to_pylist() == list(range(video["num_segments"]))
        found[video["uri"]] = (video["num_frames"], table.drop_columns(["write_id"]).to_pylist())
    return found


@pytest.mark.usefixtures("shared")
def test_shared_videos_have_the_tokens_of_those_that_one_decoder_watched(tmp_path, order, watched_alone):
    report = run_index(order(tmp_path / "store"))
    assert (report.counts.indexed, report.counts.failed) == (3, 0)
    done = {name: stage["done"] for name, stage in report.stages.items()}
    assert (done["decode"], done["parts"], done["encode"]) == (3, 8, 25)
    assert tokens_of(tmp_path / "store") == watched_alone


@pytest.mark.usefixtures("shared")
def test_a_video_that_is_replaced_between_its_parts_is_left_to_one_decoder_and_taken_again_by_the_next_run(
    tmp_path, order, long_videos, monkeypatch
):
    source, store = shutil.copytree(long_videos, tmp_path / "videos"), tmp_path / "store"

    class Replaces(stages.Watch):
        def __call__(self, plan):
            for video in plan.to_pylist():
                if video["first_unit"] and video["uri"].endswith("a.mp4"):
                    os.utime(source / "a.mp4", (1, 1))
            return super().__call__(plan)

    monkeypatch.setattr(longvlm.jobs.index.run, "Watch", Replaces)
    report = run_index(order(store, source))
    assert (report.counts.indexed, report.counts.failed) == (3, 0)
    assert report.stages["decode"]["done"] == 4
    again = run_index(order(store, source))
    assert (again.counts.indexed, again.counts.unchanged) == (1, 2)
    assert len(tokens_of(store)) == 3


@pytest.mark.usefixtures("shared")
def test_parts_that_disagree_are_given_up_for_one_decoder(tmp_path, order, monkeypatch):
    class SeesAnother(stages.Watch):
        def __call__(self, plan):
            (video,) = plan.to_pylist()
            for unit in super().__call__(plan):
                if video["first_unit"] == 5 and video["uri"].endswith("a.mp4"):
                    place = unit.schema.get_field_index("decoder")
                    yield unit.set_column(place, unit.schema.field(place), [["another"]])
                else:
                    yield unit

    monkeypatch.setattr(longvlm.jobs.index.run, "Watch", SeesAnother)
    report = run_index(order(tmp_path / "store"))
    assert (report.counts.indexed, report.counts.failed) == (3, 0)
    assert report.stages["decode"]["done"] == 4
    assert rows(tmp_path / "store", "SELECT DISTINCT decoder, attempts FROM live_videos ORDER BY 2") == [
        {"decoder": "pyav", "attempts": 1},
        {"decoder": "pyav", "attempts": 2},
    ]


@pytest.mark.usefixtures("on_ray", "shared")
def test_a_decoder_that_dies_in_a_part_costs_that_part_alone(tmp_path, order, watched_alone, monkeypatch):
    """And what it had fetched ahead besides, of which it may have decoded a unit."""
    noted = tmp_path / "noted"
    noted.mkdir()

    class Dies(stages.Watch):
        def __call__(self, plan):
            (video,) = plan.to_pylist()
            part = f"{video['uri'].rpartition('/')[2]}-{video['first_unit']}"
            for number, unit in enumerate(super().__call__(plan)):
                if number == 0:
                    (noted / f"{part}-{len(list(noted.glob(f'{part}-*')))}").touch()
                yield unit
                if part == "a.mp4-5" and not (noted / "died").exists():
                    (noted / "died").touch()
                    os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(longvlm.jobs.index.run, "Watch", Dies)
    report = run_index(order(tmp_path / "store"))
    assert (report.counts.indexed, report.counts.failed) == (3, 0)
    tries = {f"{video}.mp4-{first}-0" for video in "ab" for first in (2, 5, 8, 11)}
    begun = {f"{video}-None-0" for video in ("a.mp4", "b.mp4", "short.mp4")}
    seen = {path.name for path in noted.iterdir()}
    again = {name for name in seen if name.endswith("-1")}
    assert seen - again == tries | begun | {"died"}
    assert "a.mp4-5-1" in again
    assert len(again) <= 2
    assert tokens_of(tmp_path / "store") == watched_alone
