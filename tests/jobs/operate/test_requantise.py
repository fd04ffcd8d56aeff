import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from stores import rows

from longvlm.jobs.cli import main
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.jobs.operate import requantise
from longvlm.jobs.operate.forget import find_videos, run_forget
from longvlm.jobs.operate.maintain import MaintainOrder, run_maintain
from longvlm.jobs.operate.nightly import NightlyOrder, run_nightly
from longvlm.jobs.operate.requantise import RequantiseOrder, run_requantise
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import VIDEOS

_KEPT = "* EXCLUDE (recipe, write_id, seq, run_id)"


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return str(tmp_path / "store")


@pytest.fixture(scope="module")
def stored_anew(tmp_path_factory, indexed):
    """Where a store lies whose videos were stored as int8 besides."""
    store = str(shutil.copytree(indexed, tmp_path_factory.mktemp("int8") / "store"))
    run_requantise(RequantiseOrder(store, "int8"))
    return store


@pytest.fixture
def requantised(tmp_path, stored_anew):
    """A copy of it."""
    return str(shutil.copytree(stored_anew, tmp_path / "requantised"))


def longvlm(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_live_videos_are_stored_again_as_indexing_would_and_promoted_by_hand(store, clips, tmp_path):
    done = longvlm("maintain", "--store", store, "--dtype", "int8", "--json")
    assert done.exit_code == 0, done.output
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["name"], counts["videos"], counts["problems"]) == ("tiny-int8", 12, 0)
    assert 0 < counts["bytes_after"] < counts["bytes_before"]
    assert f"`longvlm recipe promote --store {store} tiny-int8` shows int8" in done.stderr
    assert rows(store, "SELECT DISTINCT dtype FROM tokens") == [{"dtype": "float16"}]
    before = rows(store, f"SELECT {_KEPT} FROM videos ORDER BY uri")
    assert longvlm("recipe", "promote", "--store", store, "tiny-int8").exit_code == 0
    assert rows(store, f"SELECT {_KEPT} FROM videos ORDER BY uri") == before
    assert rows(store, "SELECT DISTINCT dtype FROM tokens") == [{"dtype": "int8"}]

    by_itself = str(tmp_path / "by-itself")
    recipe = tmp_path / "small.toml"
    recipe.write_text('base = "tiny"\ndtype = "int8"\n')
    model = Store.open(store).active_recipe().model
    some = ("clip-0[0-3]*",)  # one of each length
    run_index(IndexOrder(Source(str(clips), include=some), by_itself, model=model, recipe=str(recipe)))
    asked = "WHERE regexp_matches(uri, 'clip-0[0-3]') ORDER BY uri, segment"
    told = f"SELECT uri, segment, recipe, local, scales, sizes, spans, cls FROM tokens {asked}"
    assert rows(store, told) == rows(by_itself, told) != []
    shown = f"SELECT * EXCLUDE (write_id, recipe) FROM segments {asked}"
    assert rows(store, shown) == rows(by_itself, shown)

    again = run_index(IndexOrder(Source(str(clips)), store))
    assert (again.counts.unchanged, again.counts.indexed) == (12, 0)
    assert longvlm("maintain", "--store", store, "--verify").exit_code == 0


def test_a_run_that_was_killed_goes_on_where_it_was(store, monkeypatch):
    monkeypatch.setattr(requantise, "_WAVE_VIDEOS", 5)
    kept, calls = Store.commit, []

    def commit(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(self, *args)

    monkeypatch.setattr(Store, "commit", commit)
    cut = run_requantise(RequantiseOrder(store, "int8"))
    assert (cut.videos, cut.stopped) == (5, "interrupted")
    rest = run_requantise(RequantiseOrder(store, "int8"))
    assert (rest.videos, rest.stopped) == (7, None)
    assert run_requantise(RequantiseOrder(store, "int8")).videos == 0
    counted = rows(store, "SELECT count(*) AS n, count(DISTINCT video_id) AS d FROM live_videos GROUP BY recipe")
    assert counted == [{"n": 12, "d": 12}] * 2
    assert run_maintain(MaintainOrder(store, verify=True)).stopped is None


def test_a_damaged_video_is_named_and_the_others_are_stored(store):
    (victim,) = rows(store, "SELECT write_id, uri FROM videos ORDER BY write_id LIMIT 1")
    opened = Store.open(store)
    (local,) = read_tokens(opened.pin(), [victim["write_id"]]).slice(0, 1)["local"].to_pylist()
    (file,) = opened.pin().files_for("tokens", [victim["write_id"]])
    content = Path(file.uri).read_bytes()
    at = content.index(local)
    Path(file.uri).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    done = longvlm("maintain", "--store", store, "--dtype", "int8", "--json")
    assert done.exit_code == 1
    *found, counts = map(json.loads, done.stdout.splitlines())
    assert victim["uri"] in [row["uri"] for row in found]
    assert len(found) == counts["problems"] == 12 - counts["videos"]
    assert all("is damaged" in row["problem"] for row in found)
    assert "videos that could not be stored as int8" in done.stderr
    assert run_requantise(RequantiseOrder(store, "int8")).videos == 0


def test_what_happens_to_a_video_meanwhile_holds(store, monkeypatch):
    moved, deleted, forgotten = rows(store, "SELECT * EXCLUDE (outdated) FROM videos ORDER BY uri LIMIT 3")
    kept, calls = Store.commit, []

    def commit(self, *args):
        if not calls:
            calls.append(args)
            other = Store.open(store)
            gone = {"status": "deleted", "recipe": None, "write_id": None}
            new = {**moved, "video_id": "f" * 32, "uri": "/elsewhere/moved.mp4"}
            changed = [new, *({**row, **gone} for row in (moved, deleted))]
            other.append("videos", pa.Table.from_pylist(changed, VIDEOS))
            run_forget(find_videos(store, [forgotten["uri"]]))
        return kept(self, *args)

    monkeypatch.setattr(Store, "commit", commit)
    report = run_requantise(RequantiseOrder(store, "int8"))
    assert report.stopped is None
    found = rows(store, f"SELECT uri FROM live_videos WHERE recipe = '{report.recipe}'")
    uris = {row["uri"] for row in found}
    assert len(found) == len(uris) == 10
    assert "/elsewhere/moved.mp4" in uris
    assert uris.isdisjoint({moved["uri"], deleted["uri"], forgotten["uri"]})


def test_a_video_whose_file_changed_is_left_to_the_next_run(store):
    opened = Store.open(store)
    (row,) = rows(store, "SELECT * EXCLUDE (outdated) FROM videos ORDER BY uri LIMIT 1")
    failed = {"status": "failed", "error_code": "truncated", "error": "it ends early", "size_bytes": 1, "write_id": "w"}
    opened.append("videos", pa.Table.from_pylist([row | failed], VIDEOS))
    report = run_requantise(RequantiseOrder(store, "int8"))
    assert (report.videos, report.outdated, report.stopped) == (11, 1, None)
    assert "the next index run watches them" in report.notes[0]


def test_forgetting_erases_both_writes(requantised):
    (victim,) = rows(requantised, "SELECT uri, video_id FROM videos ORDER BY uri LIMIT 1")
    of_victim = f"SELECT count(*) AS n FROM ledger_tokens WHERE video_id = '{victim['video_id']}'"
    assert rows(requantised, of_victim) != [{"n": 0}]
    assert run_forget(find_videos(requantised, [victim["uri"]])).stopped is None
    assert rows(requantised, of_victim) == [{"n": 0}]
    assert rows(requantised, "SELECT count(*) AS n FROM live_videos") == [{"n": 22}]


def test_a_promoted_recipe_is_what_a_night_goes_on_with_and_answers_come_from(requantised, clips, tmp_path):
    Store.open(requantised).promote("tiny-int8")
    some = tmp_path / "clips"
    some.mkdir()
    shutil.copy(clips / "clip-00.mp4", some / "new.mp4")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": "fall", "question": "Does anybody fall?", "type": "bool"}))
    night = run_nightly(NightlyOrder(IndexOrder(Source(str(some)), requantised), questions=str(questions)))
    assert (night.stopped, night.parts["index"]["indexed"], night.parts["answer"]["answered"]) == (None, 1, 13)
    assert rows(requantised, "SELECT dtype, count(DISTINCT video_id) AS n FROM tokens GROUP BY ALL") == [
        {"dtype": "int8", "n": 13}
    ]
    assert rows(requantised, "SELECT count(*) AS n FROM answers WHERE write_id IN (SELECT write_id FROM tokens)") == [
        {"n": 13}
    ]


@pytest.mark.parametrize(
    ("dtype", "said"), [("float16", "rounding cannot be undone"), ("int4", "and not as int4"), ("", "and not as ")]
)
def test_another_dtype_is_refused(store, dtype, said):
    done = longvlm("maintain", "--store", store, "--dtype", dtype)
    assert (done.exit_code, said in done.stderr) == (2, True)


def test_a_store_that_is_int8_already_is_refused(requantised):
    Store.open(requantised).promote("tiny-int8")
    with pytest.raises(InputError, match=r"tiny-int8 of the store .* is int8 already"):
        run_requantise(RequantiseOrder(requantised, "int8"))
    done = longvlm("maintain", "--store", requantised, "--dtype", "int8", "--verify")
    assert (done.exit_code, "--dtype goes alone" in done.stderr) == (2, True)
