from dataclasses import replace

import pyarrow as pa
import pytest

from longvlm.jobs.train.plan import PLANNED, plan_training, select_conversations
from longvlm.jobs.train.read import Reader, example_from_row
from longvlm.jobs.train.worker_config import ReaderConfig
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.pipeline.training.conversations import check_conversations
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import video_id
from longvlm.schemas.training import full

RECIPE = replace(full(), batch_videos=5, epochs=2, seed=1)
SIGHT = Sight("tower", -2, 5)


@pytest.fixture
def snapshot(indexed):
    return Store.open(indexed).pin()


@pytest.fixture
def fingerprint(indexed):
    return Store.open(indexed).active_recipe().recipe.fingerprint


def rows(*names):
    return check_conversations([{"video_id": name, "q": f"What is in {name}?", "a": "a ball"} for name in names])


@pytest.fixture
def twelve(snapshot, fingerprint):
    return plan_training(snapshot, rows(*(f"clip-{i:02}" for i in range(12)), "clip-03.mp4"), fingerprint)


def test_videos_are_found_by_any_name_and_the_rest_is_counted(snapshot, fingerprint):
    (uri,) = (
        row["uri"]
        for row in catalog.query(catalog.connect(snapshot), "FROM videos").to_pylist()
        if "clip-05" in row["uri"]
    )
    found = plan_training(snapshot, rows("clip-01", "clip-02.mp4", uri, video_id(uri), "gone", "lost"), fingerprint)
    assert sorted(row["uri"].rpartition("/")[2] for row in found.videos.to_pylist()) == [
        f"clip-0{i}.mp4" for i in (1, 2, 5)
    ]
    assert (found.num_missing, found.first_missing, found.num_conversations) == (2, "gone", 4)
    with pytest.raises(InputError, match="none of the 1 conversations is about a video that is indexed"):
        plan_training(snapshot, rows("gone"), fingerprint)
    with pytest.raises(InputError, match="none of the 1 conversations"):
        plan_training(snapshot, rows("clip-01"), "another recipe")


def test_every_epoch_shows_every_video_once_in_an_order_of_its_own(twelve):
    steps = list(twelve.steps(RECIPE))
    assert list(map(len, steps)) == [5, 5, 2] * 2
    first, second = ([place for step in steps[i : i + 3] for place in step] for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert steps == list(twelve.steps(RECIPE)) != list(twelve.steps(replace(RECIPE, seed=2)))
    assert list(twelve.steps(replace(RECIPE, max_steps=4))) == steps[:4]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_share_each_step_and_a_late_start_leaves_out_what_was_done(twelve, num_workers):
    dealt = [pa.concat_tables(twelve.blocks(RECIPE, i, num_workers, 0)).to_pylist() for i in range(num_workers)]
    uris = twelve.videos["uri"].to_pylist()
    for step, places in enumerate(twelve.steps(RECIPE)):
        shown = [row["uri"] for part in dealt for row in part if row["step"] == step]
        assert sorted(shown) == sorted(uris[place] for place in places)
    late = [pa.concat_tables(twelve.blocks(RECIPE, i, num_workers, 4)).to_pylist() for i in range(num_workers)]
    assert late == [[row for row in part if row["step"] >= 4] for part in dealt]
    assert twelve.blocks(RECIPE, 0, num_workers, 6)[0].equals(PLANNED.empty_table())


def test_the_fingerprint_is_of_words_and_tokens(snapshot, fingerprint, twelve):
    again = plan_training(snapshot, rows(*(f"clip-{i:02}" for i in range(12)), "clip-03.mp4"), fingerprint)
    assert again.fingerprint == twelve.fingerprint
    assert plan_training(snapshot, rows("clip-01"), fingerprint).fingerprint != twelve.fingerprint


def test_a_query_gives_instruction_rows_and_reaches_nothing_else(snapshot):
    found = select_conversations(snapshot, "SELECT video_id, 'Why?' AS q, codec AS a FROM videos LIMIT 2")
    assert [row.keys() for row in found] == [{"video_id", "q", "a"}] * 2
    with pytest.raises(InputError, match="the query cannot run"):
        select_conversations(snapshot, "SELECT * FROM read_text('/etc/passwd')")


def test_readers_hand_on_what_is_stored(snapshot, twelve):
    plan = pa.concat_tables(twelve.blocks(RECIPE, 0, 1, 0)).slice(0, 3)
    read = Reader(ReaderConfig(snapshot, SIGHT, 2048, None))(plan).to_pylist()
    assert [row["step"] for row in read] == plan["step"].to_pylist()
    for row, write_id in zip(read, plan["write_id"].to_pylist(), strict=True):
        example, stored = example_from_row(row), from_arrow(read_tokens(snapshot, [write_id]))
        assert example.prefix.rows.equal(stored.prefix())
        assert example.prefix.times.counts == stored.counts
        assert example.prefix.times.starts_s == tuple(2.0 * i for i in range(len(stored.counts)))
        assert all(answer == "a ball" for ((_, answer),) in example.conversations)
    fewer = Reader(ReaderConfig(snapshot, Sight("tower", -2, 0, num_marker_tokens=9), 2048, 2))(plan).to_pylist()
    assert {count for row in fewer for count in row["counts"]} == {2}
    assert [len(example_from_row(row).prefix.rows) for row in fewer] == [sum(row["counts"]) for row in fewer]


def test_a_video_without_tokens_is_told_and_the_others_are_read(snapshot, twelve):
    plan = pa.concat_tables(twelve.blocks(RECIPE, 0, 1, 0)).slice(0, 2).to_pylist()
    plan[0]["write_id"] = "00000000-0000-7000-8000-000000000000"
    first, second = Reader(ReaderConfig(snapshot, SIGHT, 2048, None))(pa.Table.from_pylist(plan, PLANNED)).to_pylist()
    assert "index the video again" in first["error"]
    assert example_from_row(first).conversations == []
    assert second["error"] is None
