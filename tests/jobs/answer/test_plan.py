import hashlib
import shutil
from dataclasses import replace

import pyarrow as pa
import pytest
from stores import LONG, TINY, deleted, index, uri_of

from longvlm.jobs.answer import plan as asking
from longvlm.jobs.answer.plan import plan
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe

RECIPE = AnswerRecipe(model="m", weights="w", index_recipe=LONG.fingerprint)
NAMES = [f"v{i}" for i in range(6)]


def table(*rows):
    return pa.Table.from_pylist([{"type": "text", **row} for row in rows], schema=tables.QUESTIONS)


def ask(text, video=None, question_id=None, **more):
    return {"question": text, "video": video, "question_id": question_id, **more}


def planned(store, *rows, recipe=RECIPE, **options):
    return plan(store.pin(), table(*rows), recipe, **options)


def groups(planned_run, size=512):
    return [group for wave in planned_run.waves(size) for group in wave.to_pylist()]


def pairs(planned_run):
    return [(group["uri"], q["question"]) for group in groups(planned_run) for q in group["questions"]]


def answer(store, planned_run, status="answered", created_at=1, recipe=RECIPE, **columns):
    """What a run would write of everything that is pending."""
    rows = [
        {**{name: q[name] for name in ("question_id", "question", "question_hash", "type")},
         "write_id": group["write_id"], "uri": group["uri"], "status": status, "run_id": "run",
         "answer_recipe": recipe.fingerprint, "created_at": created_at, **columns}
        for group in groups(planned_run) for q in group["questions"]
    ]  # fmt: skip
    store.append("answers", pa.Table.from_pylist(rows, schema=tables.ANSWERS))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of the videos NAMES, to be copied."""
    store = Store.create(str(tmp_path_factory.mktemp("made") / "store"))
    store.register_recipe(LONG, "model")
    index(store, NAMES)
    return store.uri


@pytest.fixture
def store(tmp_path, made):
    return Store.open(shutil.copytree(made, str(tmp_path / "store")))


def test_a_question_goes_to_the_video_it_names_or_to_all(store):
    found = planned(store, ask("What?"), ask("Who?", video="v2"))
    assert (found.num_videos, found.num_asked, found.num_pending) == (6, 7, 7)
    assert sorted(pairs(found)) == sorted([*((uri_of(n), "What?") for n in NAMES), (uri_of("v2"), "Who?")])


def test_groups_come_in_the_order_of_write_ids_with_all_a_worker_needs(store):
    found = groups(planned(store, ask("Is it?", question_id="b", type="choice", choices=["yes", "no"])))
    assert [group["write_id"] for group in found] == sorted(group["write_id"] for group in found)
    digest = hashlib.sha256(b"choice\x1fyes\x1fno\x1f\x1fIs it?").hexdigest()[:16]
    assert found[0]["questions"] == [
        {
            "question_id": "b",
            "question": "Is it?",
            "question_hash": digest,
            "type": "choice",
            "choices": ["yes", "no"],
            "schema": None,
        }
    ]
    assert next(planned(store, ask("What?")).waves(9)).schema.equals(tables.GROUPS)


def test_an_id_is_the_hash_where_the_file_has_none(store):
    (question,) = groups(planned(store, ask("What?", video="v0")))[0]["questions"]
    assert question["question_id"] == question["question_hash"] == hashlib.sha256(b"What?").hexdigest()[:16]


def test_answers_of_a_type_whose_rule_changed_are_other_answers_under_the_same_id(store):
    rows = [ask("How many?", "v0", type="number"), ask("What?", "v0"), ask("Red?", "v0", type="bool")]
    before = hashlib.sha256(b"number\x1f\x1f\x1fHow many?").hexdigest()[:16]  # as 0.1.0 had it while it asked twice
    many, *others = groups(planned(store, *rows))[0]["questions"]
    assert many["question_id"] == before
    assert many["question_hash"] == hashlib.sha256(f"{before}\x1frule 2".encode()).hexdigest()[:16]
    assert all(one["question_id"] == one["question_hash"] for one in others)
    ids = [many["question_id"], *(one["question_id"] for one in others)]
    hashes = [before, *(one["question_hash"] for one in others)]
    old = [
        {"question_id": name, "question_hash": hashed, "write_id": groups(planned(store, *rows))[0]["write_id"],
         "status": "answered", "run_id": "old", "answer_recipe": RECIPE.fingerprint, "created_at": 1}
        for name, hashed in zip(ids, hashes, strict=True)
    ]  # fmt: skip
    store.append("answers", pa.Table.from_pylist(old, schema=tables.ANSWERS))
    again = planned(store, *rows)
    assert (again.num_pending, again.reused) == (1, {"answered": 2})
    assert pairs(again) == [(uri_of("v0"), "How many?")]


def test_types_and_schemas_that_grammars_hold_are_told_once_each(store):
    schemas = ['{"type":"array"}', '{"type":"object"}']
    rows = [ask(f"What {n}?", type="json", schema=schema) for n in range(3) for schema in schemas]
    found = planned(store, *rows, ask("How many?", type="number"), ask("How much?", type="number"), ask("What?"))
    assert found.held_by_grammars() == [
        ("json", schemas[0], "What 0?"), ("json", schemas[1], "What 0?"), ("number", None, "How many?")
    ]  # fmt: skip


def test_the_same_question_is_asked_once(store):
    found = planned(store, ask("What?"), ask("What?"), ask("What?", video="v1"), ask("What?", video=uri_of("v1")))
    assert found.num_asked == 6
    assert len(pairs(found)) == 6


def test_one_id_for_two_questions_about_one_video_is_refused(store):
    planned(store, ask("What?", "v0", "q"), ask("Who?", "v1", "q"))
    for other in (ask("Who?", "v0", "q"), ask("What?", "v0", "q", type="bool")):
        with pytest.raises(InputError, match=r"'q' stands for two different questions about /videos/v0.mp4"):
            planned(store, ask("What?", None, "q"), other)


def test_names_are_resolved_before_the_selection_is_cut(store):
    found = planned(store, ask("What?", "v0"), ask("What?", "v3"), where="uri LIKE '%v3%' -- only this")
    assert pairs(found) == [(uri_of("v3"), "What?")]
    assert planned(store, ask("What?", "v0"), where="uri LIKE '%v3%'").num_asked == 0


def test_a_limit_counts_videos_that_are_asked_about_and_stays_with_them(store):
    rows = [ask("What?", "v4"), ask("Who?", "v4"), ask("What?", "v2"), ask("What?", "v5")]
    first = planned(store, *rows, limit=2)
    assert (first.num_videos, first.num_asked) == (2, 3)
    assert {uri for uri, _ in pairs(first)} == {uri_of("v2"), uri_of("v4")}
    answer(store, first)
    assert planned(store, *rows, limit=2).num_pending == 0
    assert planned(store, ask("What?"), limit=3).num_asked == 3


def test_what_is_not_live_is_counted_and_stops_nobody(store):
    store.append("videos", deleted(["v1"]))
    index(store, ["other"], under=TINY)
    found = planned(store, ask("What?", "v0"), ask("What?", "v1"), ask("Who?", "other"))
    assert (found.num_asked, found.num_not_indexed) == (1, 2)
    with pytest.raises(InputError, match="1 of the questions name no indexed video"):
        planned(store, ask("What?", "v0"), ask("What?", "nobody"))


@pytest.mark.parametrize(
    "where", ["colour = 1", "duration_s >", "true); DROP VIEW videos; --", "1 / (duration_s - 'x')"]
)
def test_a_predicate_that_is_no_predicate_is_refused(store, where):
    with pytest.raises(InputError):
        planned(store, ask("What?"), where=where)


def test_a_predicate_reads_nothing_but_the_store(store):
    with pytest.raises(InputError, match=r"predicate of --where cannot run: .*Cannot access file"):
        planned(store, ask("What?"), where="EXISTS (FROM read_text('/etc/passwd'))")


def test_a_selection_without_videos_is_refused(store):
    with pytest.raises(InputError, match="no indexed video is selected"):
        planned(store, ask("What?"), where="duration_s > 1e9")


def test_only_the_newest_row_says_whether_a_question_is_answered(store):
    rows = [ask("What?", "v0"), ask("Who?", "v1")]
    answer(store, planned(store, *rows), status="failed")
    assert planned(store, *rows).num_pending == 2
    answer(store, planned(store, rows[0]), status="unparsed", created_at=2)
    answer(store, planned(store, rows[1]), status="answered", created_at=2)
    found = planned(store, *rows)
    assert (found.num_pending, found.reused) == (0, {"answered": 1, "unparsed": 1})
    assert planned(store, ask("What else?", "v0"), ask("Who?", "v1", type="bool")).num_pending == 2
    assert planned(store, *rows, recipe=replace(RECIPE, budget=9)).num_pending == 2
    index(store, ["v0"])  # a new write has other tokens
    assert planned(store, *rows).num_pending == 1


def test_waves_are_bounded_in_videos_and_questions_and_lose_nothing(store, monkeypatch):
    monkeypatch.setattr(asking, "WAVE_QUESTIONS", 5)
    monkeypatch.setattr(asking, "WAVE_VIDEOS", 2)
    rows = [ask(f"What {i}?") for i in range(3)] + [ask(f"More {i}?", "v0") for i in range(9)]
    found = planned(store, *rows)
    waves = [wave.to_pylist() for wave in found.waves(4)]
    for wave in waves:
        assert len({group["write_id"] for group in wave}) <= 2
        assert sum(len(group["questions"]) for group in wave) <= 5
        assert max(len(group["questions"]) for group in wave) <= 4
    asked = [(g["uri"], q["question"]) for wave in waves for g in wave for q in g["questions"]]
    assert len(asked) == len(set(asked)) == found.num_asked == 27


def test_answers_are_read_back_in_the_order_of_the_plan_the_newest_of_each(store, monkeypatch):
    rows = [ask("What?"), ask("Who?", "v1")]
    answer(store, planned(store, ask("What?", "v5")), answer="old", created_at=1)
    found = planned(store, *rows)
    answer(store, found, answer="first", created_at=2)
    answer(store, found, answer="again", created_at=3)
    answer(store, planned(store, ask("Unasked?", "v1")), answer="no")
    read = list(found.answers(store.pin(), "run"))
    assert [row["answer"] for row in read] == ["again"] * 6 + ["old"]
    assert [row["write_id"] for row in read] == sorted(row["write_id"] for row in read)
    monkeypatch.setattr(asking, "WAVE_QUESTIONS", 2)
    assert list(found.answers(store.pin(), "run")) == read
    assert [row["answer"] for row in found.answers(store.pin(), "another")] == ["old"]


def test_a_plan_needs_no_shard(store):
    snapshot = store.pin()
    gone = {name: pinned for name, pinned in snapshot.tables.items() if name not in ("tokens", "segments")}
    assert plan(Snapshot(gone), table(ask("What?")), RECIPE).num_asked == 6
