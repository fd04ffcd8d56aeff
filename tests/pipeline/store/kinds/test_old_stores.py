"""A store that version 0.1.0 made is used as any other, also once tables have columns that it did not know."""

import json
import multiprocessing
from pathlib import Path

import duckdb
import old_stores
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores
from old_stores import FACTS, WORDS, add_a_column, metadata_commits
from stores import rows

from longvlm.jobs.answer.plan import plan
from longvlm.jobs.query.export import export_store
from longvlm.jobs.query.status import describe_store
from longvlm.pipeline.answering.questions import read_questions
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.index_file import write_index_duckdb
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.search import search
from longvlm.pipeline.store.shards import SEARCHED, read_segments, read_tokens, write_shards
from longvlm.pipeline.store.upkeep.compact import compact, merge_small_files
from longvlm.pipeline.store.upkeep.dead import dead_writes
from longvlm.pipeline.store.upkeep.erase import erase
from longvlm.pipeline.store.upkeep.repair import repair
from longvlm.pipeline.store.upkeep.vacuum import vacuum
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
from longvlm.schemas.recipe import AnswerRecipe, IndexRecipe

SPAWN = multiprocessing.get_context("spawn")
RECIPE = FACTS["answer_recipe"]["index_recipe"]


@pytest.fixture(params=["as it is", "with a column more"])
def widened(request, monkeypatch) -> bool:
    if request.param == "with a column more":
        add_a_column(monkeypatch)
    return request.param == "with a column more"


@pytest.fixture
def old(tmp_path, widened) -> Store:  # noqa: ARG001 - what the program knows by then
    return old_stores.copy_of_old(tmp_path)


def live(store: Store) -> dict[str, str]:
    """Write ids by name of what is live."""
    found = rows(store, "SELECT uri, write_id FROM live_videos")
    return {Path(row["uri"]).stem: row["write_id"] for row in found}


def old_recipe(store: Store) -> IndexRecipe:
    active = store.active_recipe()
    assert active.fingerprint == active.recipe.fingerprint == RECIPE
    return active.recipe


def watch(store: Store, *names: str, seed: int = 0) -> pa.Table:
    """Make more videos live under the old recipe, each with words in its added column where there is one."""
    encoded = stores.encoded(list(names), seed=seed)
    if "added" in tables.TOKENS.names:
        units = encoded.to_pylist()
        for segment in (segment for unit in units for segment in unit["segments"]):
            segment["added"] = WORDS
        encoded = pa.Table.from_pylist(units, tables.ENCODED)
    outcomes = write_shards(store.uri, encoded, RECIPE)
    store.commit(outcomes, stores.videos(outcomes, list(names), RECIPE, added=WORDS))
    return encoded


def test_columns_are_only_ever_added_at_the_end(tmp_path):
    old = old_stores.copy_of_old(tmp_path)
    for name, schema in tables.TABLES.items():
        for file in old.pin().table(name).files:
            held = pq.read_schema(file.uri)
            assert len(held) == tables.FIRST_COLUMNS[name]
            assert held.equals(pa.schema(list(schema)[: len(held)]))


def test_it_opens_and_every_view_shows_what_it_showed(old, widened):
    said = describe_store(old.uri)
    assert (said["videos"], said["segments"]) == ({"indexed": 2, "failed": 1}, 3)
    assert (said["recipes"][0]["recipe"], said["last_run"]["job"]) == (RECIPE, "evaluate")
    old_recipe(old)
    with catalog.connect(old.pin()) as con:
        names = [name for (name,) in con.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()]
        counts = {name: catalog.query(con, f"FROM {name}").num_rows for name in names}
        for name, schema in tables.TABLES.items():
            read = catalog.query(con, f"FROM ledger_{name}")
            assert read.column_names == schema.names
            assert not widened or read["added"].null_count == read.num_rows
    shown = {"videos": 3, "segments": 3, "tokens": 3, "answers": 2, "answers_wide": 2, "verdicts": 2, "scores": 1}
    assert {name: counts[name] for name in shown} == shown
    assert all(counts[f"ledger_{name}"] for name in tables.TABLES)
    assert {name: metadata_commits(old, name) for name in tables.TABLES} == dict.fromkeys(tables.TABLES, 1)


def test_its_tokens_are_read_and_its_segments_found(old, widened):
    snapshot, writes = old.pin(), sorted(live(old).values())
    tokens, segments = read_tokens(snapshot, writes), read_segments(snapshot, writes, SEARCHED)
    assert tokens.schema == tables.TOKENS
    assert tokens["segment"].to_pylist() == segments["segment"].to_pylist()
    assert tokens.num_rows == 3
    assert not widened or tokens["added"].null_count == 3
    best = search(snapshot, segments["embedding"][0].values.to_numpy()).rows[0]
    assert best.score == pytest.approx(1, abs=1e-3)  # searched as int8


@pytest.mark.parametrize(("changes", "reused"), [({}, {"answered": 2}), ({"seed": 1}, {})])
def test_what_it_answered_is_not_asked_again(old, tmp_path, changes, reused):
    recipe = AnswerRecipe(**{**FACTS["answer_recipe"], **changes})
    assert (recipe.fingerprint == FACTS["fingerprint"]) == (not changes)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, FACTS["questions"])))
    asking = plan(old.pin(), read_questions(str(questions)), recipe)
    assert asking.reused == reused
    assert asking.num_pending == 2 - sum(reused.values())


def test_more_is_appended_and_read_beside_what_was_there(old, widened):
    before = live(old)
    new = watch(old, "new")["write_id"][0].as_py()
    assert live(old) == {**before, "new": new}
    tokens = read_tokens(old.pin(), live(old).values())
    assert tokens["write_id"].to_pylist()[-4:] == [new] * 4
    assert tokens.num_rows == 7
    if widened:
        assert tokens["added"].to_pylist() == [None] * 3 + [WORDS] * 4
        assert rows(old, "SELECT added[1].word AS w, count(*) AS n FROM segments GROUP BY w ORDER BY w NULLS LAST") == [
            {"w": "new", "n": 4},
            {"w": None, "n": 3},
        ]
        assert rows(old, "SELECT uri FROM videos WHERE added IS NOT NULL") == [{"uri": stores.uri_of("new")}]
    # of `videos`, `segments` and `tokens` there are columns that 0.1.0 did not have
    found = {name: metadata_commits(old, name) - 1 for name in ("videos", "segments", "tokens", "answers")}
    assert found == {"videos": 1, "segments": 1, "tokens": 1, "answers": 0}
    with duckdb.connect(str(write_index_duckdb(old.uri, old.pin()))) as con:
        assert con.execute("SELECT count(*), count(DISTINCT uri) FROM tokens").fetchall() == [(7, 3)]


@pytest.mark.usefixtures("few_are_merged")
def test_it_is_merged_rewritten_swept_and_found_whole(old, widened):
    before = {name: read_tokens(old.pin(), [write]).to_pylist() for name, write in live(old).items()}
    for number in range(3):
        watch(old, f"v{number}", seed=number)
    assert {**merge_small_files(old)} == {"videos": 3, "segments": 3, "answers": 0, "verdicts": 0}
    (gone,) = rows(old, "SELECT video_id, source FROM videos WHERE uri LIKE '%two.mp4'")
    old.append("videos", pa.Table.from_pylist([{**gone, "status": "deleted"}], tables.VIDEOS))
    assert compact(old, dead_writes(old, 0))["tokens"] == 3
    assert vacuum(old, 0)["files"] > 8
    checked = verify(Store.open(old.uri).pin())
    assert (checked.num_videos, checked.damaged_files, checked.problems) == (4, {}, [])
    assert read_tokens(old.pin(), [live(old)["one"]]).to_pylist() == before["one"]
    counted = rows(old, f"SELECT count(*) AS n, count({'added' if widened else 'NULL'}) AS words FROM ledger_tokens")
    assert counted == [{"n": 13, "words": 12 if widened else 0}]


def test_what_it_lost_is_found_and_taken_out(old):
    lost = live(old)["two"]
    watch(old, "new")
    damaged = next(file.uri for file in old.pin().files_for("tokens", [lost]))
    Path(damaged).write_bytes(Path(damaged).read_bytes()[:-20] + bytes(20))
    snapshot = old.pin()
    found = verify(snapshot)
    assert list(found.damaged_files) == [damaged]
    assert repair(old, found, "run").videos == 2
    assert set(live(old)) == {"new"}
    assert not verify(old.pin()).problems


def test_one_of_its_videos_is_forgotten(old):
    watch(old, "new")
    (asked,) = rows(old, "SELECT video_id, write_id FROM live_videos WHERE uri LIKE '%one.mp4'")
    erased = erase(old, [asked["video_id"]], "run")
    assert erased.rows == {"tokens": 1, "segments": 1, "verdicts": 2, "answers": 2, "videos": 1}
    held = [path for path in Path(old.uri).rglob("*.parquet") if asked["write_id"].encode() in path.read_bytes()]
    assert not held
    assert set(live(old)) == {"two", "new"}
    assert not verify(old.pin()).problems
    assert read_tokens(old.pin(), live(old).values()).num_rows == 6


def test_it_is_exported(old, widened, tmp_path):
    watch(old, "new")
    report = export_store(old.uri, str(tmp_path / "out.duckdb"), segments=True)
    assert (report.rows["videos"], report.rows["answers"], report.rows["segments"]) == (4, 2, 7)
    with duckdb.connect(str(tmp_path / "out.duckdb")) as con:
        assert ("added" in con.sql("FROM segments").columns) == widened


# --- columns that are added ---


def test_each_table_gets_its_columns_once_and_with_its_first_rows(tmp_path, monkeypatch):
    add_a_column(monkeypatch)
    old = old_stores.copy_of_old(tmp_path)
    for _ in range(2):
        watch(old, "a")
        for name in ("answers", "verdicts", "recipes", "runs"):
            old.append(name, pa.Table.from_pylist([{"added": WORDS}], tables.TABLES[name]))
        old = Store.open(old.uri)
    assert {name: metadata_commits(old, name) for name in tables.TABLES} == dict.fromkeys(tables.TABLES, 2)
    assert {name: old.columns(name).names for name in tables.TABLES} == {
        name: schema.names for name, schema in tables.TABLES.items()
    }


def test_two_may_add_a_column_at_once(tmp_path):
    uri = old_stores.copy_of_old(tmp_path).uri
    start = SPAWN.Barrier(2)
    writers = [SPAWN.Process(target=old_stores.add_a_column_at_once, args=(uri, start)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert metadata_commits(Store.open(uri), "runs") == 2
    with pytest.MonkeyPatch.context() as patch:
        add_a_column(patch)
        assert rows(Store.open(uri), "SELECT count(*) AS n, count(added) AS words FROM runs") == [{"n": 5, "words": 2}]


@pytest.mark.usefixtures("few_are_merged")
def test_a_column_that_is_not_known_here_is_kept(tmp_path):
    old = old_stores.copy_of_old(tmp_path)
    with pytest.MonkeyPatch.context() as patch:  # a newer version
        add_a_column(patch)
        watch(old, "of the newer")
    watch(old, "v0")
    assert live(old).keys() >= {"one", "of the newer", "v0"}
    assert compact(old, dead_writes(old, 48))["tokens"] == 2
    assert not verify(old.pin()).problems
    with pytest.MonkeyPatch.context() as patch:
        add_a_column(patch)
        found = rows(old, "SELECT uri, count(added) AS n FROM tokens GROUP BY uri HAVING n > 0")
    assert found == [{"uri": stores.uri_of("of the newer"), "n": 4}]


def test_of_files_with_like_columns_one_is_opened(tmp_path, monkeypatch):
    old = old_stores.copy_of_old(tmp_path)
    watch(old, "a")
    add_a_column(monkeypatch)
    for name in ("b", "c"):
        watch(old, name)
    snapshot = old.pin()
    first = {}
    for file in snapshot.table("tokens").files:
        first.setdefault(len(pq.read_schema(file.uri)), file.uri)
    for file in snapshot.table("tokens").files:
        if file.uri not in first.values():
            Path(file.uri).write_bytes(b"damaged")
    with catalog.connect(snapshot) as con:
        assert con.sql("FROM tokens").columns[-3:] == ["added", "uri", "external_id"]
    assert len(first) == 3  # of 0.1.0, of now, and with the added one
