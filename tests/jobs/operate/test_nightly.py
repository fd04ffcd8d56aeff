import json
import os
import shutil
import time
from functools import partial

import pyarrow as pa
import pytest
from click.testing import CliRunner
from servers import Webhook
from stores import rows

import longvlm.jobs.answer.run
import longvlm.jobs.index.run
import longvlm.jobs.operate.nightly
from longvlm.jobs.answer.estimate import last_measured_run
from longvlm.jobs.answer.run import AnswerOrder, answer_questions
from longvlm.jobs.cli import main
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.operate.nightly import NightlyOrder, run_nightly
from longvlm.jobs.operate.standstill import Standstill
from longvlm.pipeline.answering.questions import read_questions
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.pipeline.store.lease import Lease, create, newest
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_write_id
from longvlm.schemas.tables import TABLES


@pytest.fixture
def store(tmp_path, indexed):
    return shutil.copytree(indexed, tmp_path / "store")


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question_id": "fall", "question": "Does anybody fall?", "type": "bool"}))
    return str(file)


def night(source, store, *, questions=None, alerts=None, webhook=None, **index):
    order = IndexOrder(Source(str(source)), str(store), **index)
    return run_nightly(NightlyOrder(order, questions=questions, alerts=alerts, webhook=webhook))


def nights(store):
    return rows(store, "FROM runs WHERE job = 'nightly' ORDER BY seq")


def versions(store):
    pinned = Store.open(str(store)).pin()
    return {table: pinned.table(table).version for table in TABLES}


def test_a_night_does_what_is_new_and_the_next_one_nothing(source, store, questions, monkeypatch):
    (source / "clip-00.mp4").unlink()
    shutil.copyfile(source / "clip-01.mp4", source / "new.mp4")
    (source / "clip-02.mp4").write_bytes(b"")
    first = night(source, store, questions=questions).parts
    assert {name: first["index"][name] for name in ("indexed", "failed", "deleted", "unchanged")} == {
        "indexed": 1,
        "failed": 1,
        "deleted": 1,
        "unchanged": 10,
    }
    assert (first["answer"]["asked"], first["answer"]["answered"]) == (12, 12)  # clip-02 still answers as it was
    assert len(rows(store, "FROM answers")) == 12
    assert last_measured_run(Store.open(str(store)).pin())["run_id"] == first["answer"]["run_id"]

    def never(*_):
        raise AssertionError("there is nothing to do that needs workers")

    monkeypatch.setattr(longvlm.jobs.index.run, "open_executor", never)
    monkeypatch.setattr(longvlm.jobs.answer.run, "open_executor", never)
    before = versions(store)
    second = night(source, store, questions=questions)
    assert second.stopped is None
    assert (second.parts["index"]["unchanged"], second.parts["index"]["known_failed"]) == (11, 1)
    assert (second.parts["answer"]["asked"], second.parts["answer"]["reused"]) == (12, 12)
    assert versions(store) == {**before, "runs": before["runs"] + 1}
    one, two = nights(store)
    counts = json.loads(two["counts"])
    assert {"index", "answer", "maintain", "alerts"} < set(counts)
    assert counts["questions_sha256"] == json.loads(one["counts"])["questions_sha256"]
    assert (counts["run_id"], counts["stopped"], two["run_id"]) == (second.run_id, None, second.run_id)
    assert json.loads(one["stage_s"]).keys() >= {"index.decode", "answer.decode"}


def test_what_failed_for_a_passing_reason_is_tried_again(source, store):
    (source / "clip-00.mp4").write_bytes(b"not a video" * 9)
    (source / "clip-01.mp4").touch()
    listing = list_source(Source(str(source))).to_pylist()
    failed = [
        {**video, "status": "failed", "error_code": code, "error": "...", "attempts": 1, "write_id": new_write_id()}
        for video, code in zip(listing, ("not_a_video", "network"), strict=False)
    ]
    opened = Store.open(str(store))
    recipe = opened.active_recipe().fingerprint
    told = [{**row, "recipe": recipe} for row in failed]
    opened.append("videos", pa.Table.from_pylist(told, tables.VIDEOS))
    counts = night(source, store).parts["index"]
    assert (counts["indexed"], counts["known_failed"], counts["unchanged"]) == (1, 1, 10)


def test_a_night_that_would_delete_too_much_says_so_and_does_the_rest(source, store, questions):
    for clip in sorted(source.iterdir())[:6]:
        clip.unlink()
    server = Webhook(200)
    args = ["nightly", str(source), "--store", str(store), "--questions", questions, "--webhook", server.url]
    done = CliRunner().invoke(main, args)
    server.shutdown()
    assert done.exit_code == 1
    assert "index: 6 of the 12 videos known" in done.output
    (row,) = nights(store)
    counts = json.loads(row["counts"])
    assert "--allow-mass-delete" in counts["index"]["stopped"]
    assert counts["answer"]["answered"] == 12
    assert "files_fewer" in counts["maintain"]
    assert (counts["alerts"]["posted"], list(counts["alerts"]["raised"])) == (1, ["a part of the nightly stopped"])
    assert "6 of the 12" in server.posts[0]["text"]
    assert night(source, store, allow_mass_delete=True).parts["index"]["deleted"] == 6


def test_an_alert_that_cannot_be_posted_is_kept_and_exits_with_1(source, store, tmp_path):
    file = tmp_path / "alerts.sql"
    file.write_text("-- name: always\nSELECT 1 AS one;")
    server = Webhook(403)
    args = ["nightly", str(source), "--store", str(store), "--alerts", str(file), "--json"]
    done = CliRunner().invoke(main, args, env={"LONGVLM_WEBHOOK": server.url})
    server.shutdown()
    assert done.exit_code == 1
    assert "403" in done.stderr
    assert "SECRET" not in done.output
    assert json.loads(done.stdout)["alerts"]["raised"] == {"always": 1}
    assert json.loads(nights(store)[0]["counts"])["alerts"]["raised"] == {"always": 1}


def test_a_second_nightly_does_nothing_and_exits_with_0(source, store):
    before = versions(store)
    with Lease(str(store), "nightly", lambda: None):
        done = CliRunner().invoke(main, ["nightly", str(source), "--store", str(store)])
    assert done.exit_code == 0
    assert "nothing to do here: one has been running" in done.output
    assert versions(store) == before


def test_a_night_whose_lease_is_taken_over_ends(source, store, monkeypatch):
    monkeypatch.setattr(longvlm.jobs.operate.nightly, "Lease", partial(Lease, expiry_s=3.0))

    def takes_long(order):
        folder = f"{order.store}/leases/nightly"
        is_taken = False
        while not is_taken:  # the holder may renew it in between
            generation, claim = newest(folder)
            other = {**vars(claim), "holder": "another", "until_s": time.time() + 900}
            is_taken = create(f"{folder}/{generation + 1:09}.json", json.dumps(other).encode())
        time.sleep(60)

    monkeypatch.setattr(longvlm.jobs.operate.nightly, "index_source", takes_long)
    report = night(source, store)
    assert "another run took over" in report.stopped
    assert list(report.parts) == ["index"]
    assert "another run took over" in json.loads(nights(store)[0]["counts"])["stopped"]
    assert newest(f"{store}/leases/nightly")[1].holder == "another"


def test_a_night_in_which_nothing_moves_ends_and_keeps_nobody_away(source, store, monkeypatch):
    """A part waits for what never comes: here a pipe that nobody writes into."""
    monkeypatch.setattr(longvlm.jobs.operate.nightly, "Lease", partial(Lease, expiry_s=3.0))
    monkeypatch.setattr(longvlm.jobs.operate.nightly, "Standstill", partial(Standstill, 2.5))
    reading, writing = os.pipe()

    def hangs(*_):
        os.read(reading, 1)

    monkeypatch.setattr(longvlm.jobs.operate.nightly, "maintain_store", hangs)
    report = night(source, store)
    os.close(reading), os.close(writing)
    assert "nothing has moved" in report.stopped
    assert "it waits in hangs of " in report.stopped
    assert list(report.parts) == ["index", "maintain"]
    assert "nothing has moved" in json.loads(nights(store)[0]["counts"])["stopped"]


def test_a_part_that_breaks_is_in_the_row_all_the_same(source, store, monkeypatch):
    def breaks(*_):
        raise RuntimeError("the counts do not add up")

    monkeypatch.setattr(longvlm.jobs.operate.nightly, "index_source", breaks)
    with pytest.raises(RuntimeError):
        night(source, store)
    assert "do not add up" in json.loads(nights(store)[0]["counts"])["stopped"]
    monkeypatch.undo()
    assert night(source, store).stopped is None  # the lease was given back


def test_hours_are_for_watching_and_answering_together(source, tmp_path, model, questions):
    report = night(source, tmp_path / "store", model=model, questions=questions, max_hours=1e-6)
    assert report.stopped is None
    assert report.parts["index"]["indexed"] > 0  # what came in with the outcome that ended it
    assert report.parts["answer"] == {"out_of_time": True}
    assert "files_fewer" in report.parts["maintain"]


def test_answering_alone_ends_at_its_hours_and_keeps_what_was_answered(store, questions):
    before = versions(store)
    report = answer_questions(AnswerOrder(str(store), read_questions(questions), max_hours=1e-9))
    assert (report.out_of_time, report.stopped) == (True, None)
    assert report.given.total() > 0
    assert versions(store) == {**before, "answers": before["answers"] + 1}


def test_a_bucket_has_its_nights_too(s3, clips, model, questions):
    for i in range(3):
        s3.upload_file(str(clips / f"clip-0{i}.mp4"), "bucket", f"videos/{i}.mp4")
    s3.upload_file(questions, "bucket", "standing.jsonl")
    asked = "s3://bucket/standing.jsonl"

    def nightly():
        args = ["s3://bucket/videos", "--store", "s3://bucket/index", "--model", model, "--questions", asked]
        done = CliRunner().invoke(main, ["nightly", *args, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    first = nightly()
    assert (first["index"]["indexed"], first["answer"]["answered"], first["alerts"]["raised"]) == (3, 3, {})
    s3.upload_file(str(clips / "clip-03.mp4"), "bucket", "videos/1.mp4")
    s3.upload_file(str(clips / "clip-04.mp4"), "bucket", "videos/new.mp4")
    with Lease("s3://bucket/index", "nightly", lambda: None):
        assert "one has been running" in nightly()["skipped"]
    second = nightly()
    assert (second["index"]["indexed"], second["index"]["unchanged"]) == (2, 2)
    assert (second["answer"]["asked"], second["answer"]["reused"], second["answer"]["answered"]) == (4, 2, 4)


def test_an_emptied_source_leaves_nothing_to_ask_and_no_alarm(source, store, questions):
    for clip in source.iterdir():
        clip.unlink()
    report = night(source, store, questions=questions, allow_mass_delete=True)
    assert report.stopped is None
    assert report.parts["index"]["deleted"] == 12
    assert report.parts["answer"] == {"asked": 0}
    assert report.parts["alerts"]["raised"] == {}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["SOURCE"], "--model"),
        (["SOURCE", "--model", "MODEL", "--questions", "none.jsonl"], "none.jsonl"),
        (["SOURCE", "--model", "MODEL", "--alerts", "none.sql"], "none.sql"),
        (["SOURCE", "--model", "MODEL", "--webhook", "file:///etc/passwd"], "webhook"),
        (["SOURCE", "--model", "MODEL", "--retention-hours", "1"], "48"),
    ],
)
def test_wrong_input_is_a_sentence_and_writes_nothing(tmp_path, clips, model, args, says):
    args = [{"SOURCE": str(clips), "MODEL": model}.get(arg, arg) for arg in args]
    done = CliRunner().invoke(main, ["nightly", *args, "--store", str(tmp_path / "store")])
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "store").exists()


def test_an_order_for_half_a_look_cannot_prune(source, store):
    with pytest.raises(InputError, match="--prune with --limit"):
        night(source, store, limit=3)
