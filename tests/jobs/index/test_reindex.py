"""A source changes between two runs: what is moved, gone, forgotten, broken or too much for one night."""

import os
import shutil
from dataclasses import replace

import pytest
from stores import rows

import longvlm.jobs.index.run
import longvlm.jobs.limits
from clips import write_clip
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.pipeline.store.upkeep.erase import erase
from longvlm.pipeline.store.upkeep.vacuum import vacuum
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import video_id


def order_for(source, store, **settings):
    return IndexOrder(Source(str(source)), str(store), **{"recipe": "tiny", **settings})


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory, clips, model):
    """A source of four clips and a broken one, a copy of it, and the store that holds them."""
    folder = tmp_path_factory.mktemp("yesterday")
    source = folder / "source"
    source.mkdir()
    for i in range(4):
        shutil.copy(clips / f"clip-{i:02}.mp4", source)
    (source / "broken.mp4").write_bytes(b"no video" * 100)
    shutil.copytree(source, folder / "kept")
    first = run_index(order_for(source, folder / "store", model=model))
    assert (first.counts.indexed, first.counts.failed) == (4, 1)
    return folder


@pytest.fixture
def night(tmp_path, yesterday):
    """The source as it was, at the place where the store knows it, and a store of one's own."""
    shutil.rmtree(yesterday / "source", ignore_errors=True)
    source = shutil.copytree(yesterday / "kept", yesterday / "source")
    return source, shutil.copytree(yesterday / "store", tmp_path / "store")


def test_a_run_does_what_changed_as_far_as_it_may_and_the_next_the_rest(night):
    source, store = night
    shutil.copyfile(source / "clip-03.mp4", source / "clip-00.mp4")
    for name in ("new-1", "new-2"):
        write_clip(source / f"{name}.mp4", 25)
    (source / "new-3.mp4").touch()
    first = run_index(order_for(source, store, limit=2))
    assert (first.counts.unchanged, first.counts.indexed, first.counts.not_attempted) == (3, 2, 2)
    (changed,) = rows(store, "SELECT duration_s FROM videos WHERE uri LIKE '%clip-00.mp4'")
    assert changed["duration_s"] == 4.0
    second = run_index(order_for(source, store))
    assert (second.counts.unchanged, second.counts.indexed, second.counts.failures) == (5, 1, {"empty_file": 1})
    again = run_index(order_for(source, store))
    assert (again.counts.unchanged, again.counts.known_failed, again.stages) == (6, 2, {})


def test_what_is_gone_answers_until_it_is_pruned(night):
    source, store = night
    (source / "clip-00.mp4").unlink()
    seen = run_index(order_for(source, store))
    assert (seen.counts.unchanged, seen.counts.gone, seen.counts.deleted, seen.stages) == (3, 1, 0, {})
    assert len(rows(store, "FROM live_videos")) == 4
    pruned = run_index(order_for(source, store, prune=True))
    assert (pruned.counts.unchanged, pruned.counts.gone, pruned.counts.deleted) == (3, 0, 1)
    assert len(rows(store, "FROM live_videos")) == 3
    again = run_index(order_for(source, store, prune=True))
    assert (again.counts.deleted, again.counts.gone) == (0, 0)
    write_clip(source / "clip-00.mp4", 25)
    back = run_index(order_for(source, store, prune=True))
    assert (back.counts.indexed, back.counts.unchanged) == (1, 3)


def test_a_large_loss_is_taken_for_a_mistake(night):
    source, store = night
    for i in range(2):
        (source / f"clip-0{i}.mp4").unlink()
    with pytest.raises(InputError, match=r"2 of the 5 videos known of .* --allow-mass-delete"):
        run_index(order_for(source, store, prune=True))
    assert len(rows(store, "FROM live_videos")) == 4
    shutil.rmtree(source)
    source.mkdir()
    with pytest.raises(InputError, match="nothing to index"):
        run_index(order_for(source, store, prune=True))
    emptied = run_index(order_for(source, store, prune=True, allow_mass_delete=True))
    assert (emptied.counts.listed, emptied.counts.deleted) == (0, 5)
    assert rows(store, "FROM live_videos") == []


def test_only_what_the_patterns_show_is_pruned(night):
    source, store = night
    for name in ("clip-00.mp4", "clip-01.mp4"):
        (source / name).unlink()
    patterns = Source(str(source), include=("clip-00*", "clip-02*", "clip-03*", "broken*"))
    some = run_index(
        IndexOrder(patterns, str(store), recipe="tiny", prune=True, allow_mass_delete=True),
    )
    assert (some.counts.listed, some.counts.deleted) == (3, 1)
    assert {row["uri"].rpartition("/")[2] for row in rows(store, "FROM live_videos")} == {
        "clip-01.mp4",
        "clip-02.mp4",
        "clip-03.mp4",
    }


def test_a_forgotten_video_is_not_indexed_again(night):
    source, store = night
    uri = str(source / "clip-01.mp4")
    erase(Store.open(str(store)), [video_id(uri)], "run")
    kept_out = run_index(order_for(source, store, prune=True))
    assert (kept_out.counts.forgotten, kept_out.counts.unchanged, kept_out.counts.deleted) == (1, 3, 0)
    (source / "clip-01.mp4").unlink()
    run_index(order_for(source, store, prune=True))
    write_clip(source / "clip-01.mp4", 25)
    assert run_index(order_for(source, store)).counts.indexed == 1


def test_failures_are_tried_again_by_code(night):
    source, store = night
    assert run_index(order_for(source, store, retry_failed=("network",))).counts.known_failed == 1
    assert run_index(order_for(source, store, retry_failed=("not_a_video",))).counts.failed == 1
    (row,) = rows(store, "FROM failures")
    assert row["attempts"] == 2


def test_a_run_ends_well_when_its_time_is_over_and_the_next_goes_on(tmp_path, clips, model, monkeypatch):
    plain = longvlm.jobs.index.run.for_index
    monkeypatch.setattr(
        longvlm.jobs.index.run,
        "for_index",
        lambda *facts, **options: replace(plain(*facts, **options), units_per_shard=2),
    )
    first = run_index(order_for(clips, tmp_path / "store", model=model, max_hours=1e-9))
    assert first.out_of_time
    assert first.stopped is None
    assert first.counts.not_attempted == 12 - first.counts.indexed > 0
    second = run_index(order_for(clips, tmp_path / "store"))
    assert (second.counts.unchanged, second.counts.indexed) == (first.counts.indexed, first.counts.not_attempted)


def test_a_run_in_which_too_much_fails_of_outages_stops(tmp_path, model, monkeypatch):
    monkeypatch.setattr(longvlm.jobs.limits, "MIN_OUTCOMES", 3)
    (tmp_path / "list.csv").write_text("\n".join(["uri", *(f"{i}.mp4" for i in range(12))]))
    report = run_index(order_for(tmp_path / "list.csv", tmp_path / "store", model=model, max_failed=0.5))
    assert "videos failed, more than --max-failed allows, and not by themselves (not_found" in report.stopped
    assert report.counts.failed + report.counts.not_attempted == 12
    assert len(rows(tmp_path / "store", "FROM failures")) == report.counts.failed > 2


def test_files_that_fail_by_themselves_stop_nothing_and_are_told_of(tmp_path, clips, model, monkeypatch):
    monkeypatch.setattr(longvlm.jobs.limits, "MIN_OUTCOMES", 3)
    for i in range(6):
        (tmp_path / f"{i}.mp4").write_bytes(b"no video" * 100 if i else b"")
    shutil.copy(clips / "clip-00.mp4", tmp_path / "z.mp4")
    shutil.copy(clips / "clip-00.mp4", os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mp4"))
    (tmp_path / "a.srt").touch()
    report = run_index(order_for(tmp_path, tmp_path / "store", model=model, max_failed=0.0))
    assert report.stopped is None
    assert (report.counts.indexed, report.counts.failed, report.counts.not_attempted) == (1, 7, 0)
    told = report.as_json()
    assert told["left_out"] == {".srt": 1}
    assert told["mostly_failed"].startswith(
        "more than half of the videos failed by themselves: 7 of 8 (not_a_video 5, empty_file 1, bad_entry 1);"
    )
    (bad,) = rows(tmp_path / "store", "FROM failures WHERE error_code = 'bad_entry'")
    assert bad["uri"] == f"{tmp_path}/\\xe9.mp4"
    again = run_index(order_for(tmp_path, tmp_path / "store"))
    assert (again.counts.known_failed, again.counts.unchanged, again.as_json()["mostly_failed"]) == (7, 1, None)


def test_videos_whose_shards_are_taken_before_their_commit_are_watched_again(night, monkeypatch):
    source, store = night
    write_clip(source / "new-1.mp4", 25)
    plain, swept = Store.commit, []

    def commit(self, outcomes, videos, **options):
        if not swept:
            swept.append(vacuum(Store.open(str(store)), 0)["files"])  # as one does who takes the driver for dead
        return plain(self, outcomes, videos, **options)

    monkeypatch.setattr(Store, "commit", commit)
    report = run_index(order_for(source, store))
    assert swept == [2]
    assert (report.counts.indexed, report.counts.not_attempted) == (1, 0)
    (video,) = rows(store, "FROM live_videos WHERE uri LIKE '%new-1%'")
    assert read_tokens(Store.open(str(store)).pin(), [video["write_id"]]).num_rows == video["num_segments"]


def run_overtaken_by(night, monkeypatch, meanwhile):
    """A run that has watched all there is when something happens to the source and others index it; then it commits."""
    plain, left = Store.commit, [meanwhile]

    def commit(self, outcomes, videos, **options):
        if left:
            left.pop()()
        return plain(self, outcomes, videos, **options)

    monkeypatch.setattr(Store, "commit", commit)
    return run_index(order_for(*night))


def test_what_was_listed_before_does_not_hide_what_another_run_indexed_since(night, monkeypatch):
    source, store = night
    write_clip(source / "clip-00.mp4", 25)
    write_clip(source / "new.mp4", 25)

    def replaced():
        write_clip(source / "clip-00.mp4", 50)
        assert run_index(order_for(source, store)).counts.indexed == 2

    report = run_overtaken_by(night, monkeypatch, replaced)
    assert (report.counts.indexed, report.counts.not_attempted) == (1, 1)
    assert "another run indexed a newer file" in report.notes[0]
    (live,) = rows(store, "SELECT num_frames FROM live_videos WHERE uri LIKE '%clip-00%'")
    assert live["num_frames"] == 50
    again = run_index(order_for(source, store)).counts
    assert (again.unchanged, again.indexed) == (5, 0)


def test_what_another_run_found_gone_since_does_not_come_back(night, monkeypatch):
    source, store = night
    write_clip(source / "clip-00.mp4", 25)

    def removed():
        (source / "clip-00.mp4").unlink()
        assert run_index(order_for(source, store, prune=True)).counts.deleted == 1

    report = run_overtaken_by(night, monkeypatch, removed)
    assert (report.counts.indexed, report.counts.not_attempted) == (0, 1)
    assert rows(store, "SELECT uri FROM live_videos WHERE uri LIKE '%clip-00%'") == []


def test_what_was_listed_later_stays_though_a_slower_run_commits_before_it(night, monkeypatch):
    source, store = night
    write_clip(source / "clip-00.mp4", 50)
    shutil.copy2(source / "clip-00.mp4", source.parent / "newest.mp4")

    def slower():
        write_clip(source / "clip-00.mp4", 25)
        assert run_index(order_for(source, store)).counts.indexed == 1
        shutil.copy2(source.parent / "newest.mp4", source / "clip-00.mp4")

    assert run_overtaken_by(night, monkeypatch, slower).counts.indexed == 1
    (live,) = rows(store, "SELECT num_frames FROM live_videos WHERE uri LIKE '%clip-00%'")
    assert live["num_frames"] == 50


def counts_of_a_run_while_one_is_forgotten(night, monkeypatch, name):
    """A run that has watched all there is when a video is forgotten, and commits after that."""
    source, store = night
    plain, erased = Store.commit, []

    def commit(self, outcomes, videos, **options):
        if not erased:
            erased.append(erase(Store.open(str(store)), [video_id(str(source / name))], "forget"))
        return plain(self, outcomes, videos, **options)

    monkeypatch.setattr(Store, "commit", commit)
    counts = run_index(order_for(source, store)).counts
    assert erased[0].still_there == []
    return counts


def test_a_video_that_is_forgotten_while_it_is_watched_stays_out(night, monkeypatch):
    source, store = night
    shutil.copyfile(source / "clip-03.mp4", source / "clip-00.mp4")
    counts = counts_of_a_run_while_one_is_forgotten(night, monkeypatch, "clip-00.mp4")
    assert (counts.indexed, counts.forgotten, counts.not_attempted) == (0, 1, 0)
    assert not rows(store, "FROM ledger_videos WHERE uri LIKE '%clip-00%'")


def test_a_copy_of_a_video_that_is_forgotten_while_it_is_watched_stays_out(night, monkeypatch):
    source, store = night
    shutil.copy2(source / "clip-03.mp4", source / "copy.mp4")  # of one size and time: all that tells content here
    counts = counts_of_a_run_while_one_is_forgotten(night, monkeypatch, "clip-03.mp4")
    assert (counts.indexed, counts.forgotten, counts.not_attempted) == (0, 1, 0)
    assert not rows(store, "FROM ledger_videos WHERE uri LIKE '%copy%'")
    assert not rows(store, f"FROM ledger_tokens WHERE video_id = '{video_id(str(source / 'copy.mp4'))}'")
    (source / "clip-03.mp4").unlink()
    again = run_index(order_for(source, store)).counts  # which knows it by its content, as the only one that has it
    assert (again.indexed, again.forgotten) == (0, 1)
