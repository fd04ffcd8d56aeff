import json
import shutil

import pytest
from servers import Webhook
from stores import LONG, index

from longvlm.jobs.operate import alerts
from longvlm.jobs.operate.alerts import Alert, check_webhook, post_webhook, read_alerts, run_alerts
from longvlm.pipeline.store import delta
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.errors import InputError

RUN = {"run_id": "run-7", "job": "nightly", "counts": "{}", "wall_s": 1.0, "seq": 10**15}


@pytest.fixture
def webhook():
    opened = []

    def open_one(*statuses):
        opened.append(Webhook(*statuses))
        return opened[-1]

    yield open_one
    for server in opened:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(alerts, "_WAITS_S", (0.01, 0.01))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Where a store of 30 videos lies."""
    made = Store.create(str(tmp_path_factory.mktemp("filled") / "store"))
    made.register_recipe(LONG, "made-up")
    index(made, [f"v{i:02}" for i in range(30)])
    return made.uri


@pytest.fixture
def store(tmp_path, filled):
    return Store.open(str(shutil.copytree(filled, tmp_path / "store")))


def test_a_query_with_rows_is_posted_and_one_without_is_not(store, webhook):
    server = webhook(200)
    asked = [
        Alert(
            "videos there are",
            "SELECT uri, 'nan'::DOUBLE AS nothing, 'infinity'::DATE AS ever FROM videos ORDER BY 1",
        ),
        Alert("none of these", "SELECT 1 WHERE false"),
    ]
    report = run_alerts(store.pin(), RUN, asked, store.uri, server.url)
    assert report.as_json() == {"raised": {"videos there are": 30}, "num_raised": 1, "posted": 1, "stopped": None}
    (posted,) = server.posts
    assert (posted["alert"], posted["store"], posted["run_id"]) == ("videos there are", store.uri, "run-7")
    assert (posted["num_rows"], len(posted["rows"]), posted["rows"][0]["uri"]) == (30, 20, "/videos/v00.mp4")
    assert (posted["rows"][0]["nothing"], posted["rows"][0]["ever"]) == (None, "infinity")
    assert posted["text"].startswith(f"longvlm: videos there are ({store.uri})\nuri /videos/v00.mp4")


def test_the_run_under_way_is_among_the_runs(store):
    asked = [Alert("now", "SELECT * FROM runs WHERE run_id = 'run-7' AND finished_at IS NOT NULL")]
    assert run_alerts(store.pin(), RUN, asked, store.uri, None).raised == {"now": 1}


def test_a_query_that_cannot_run_keeps_no_other_back(store, webhook):
    server = webhook(200)
    asked = [Alert("broken", "SELECT nonsense FROM videos"), Alert("good", "SELECT 1")]
    report = run_alerts(store.pin(), RUN, asked, store.uri, server.url)
    assert report.raised == {"good": 1}
    assert len(server.posts) == 1
    assert "'broken'" in report.as_json()["stopped"]
    assert "nonsense" in report.as_json()["stopped"]


def test_a_query_without_an_end_is_ended_and_keeps_no_other_back(store, monkeypatch):
    monkeypatch.setattr(alerts, "QUERY_S", 0.3)
    endless = "SELECT count(*) FROM range(10_000_000) a, range(10_000_000) b WHERE a.range * b.range = 7"
    report = run_alerts(store.pin(), RUN, [Alert("endless", endless), Alert("good", "SELECT 1")], store.uri, None)
    assert report.raised == {"good": 1}
    assert report.problems == ["the alert 'endless' ran for more than 0 s and was ended"]


def test_a_query_sees_nothing_but_the_store(store, tmp_path):
    (tmp_path / "secret.csv").write_text("password\nsesame\n")
    asked = [Alert("curious", f"SELECT * FROM read_csv('{tmp_path}/secret.csv')")]
    report = run_alerts(store.pin(), RUN, asked, store.uri, None)
    assert report.raised == {}
    assert "'curious'" in report.as_json()["stopped"]


def test_a_webhook_that_stumbles_is_tried_again(webhook):
    server = webhook(500, 429, 200)
    assert post_webhook(server.url, {"text": "hello"}) is None
    assert len(server.posts) == 3


@pytest.mark.parametrize(("status", "tries"), [(503, 3), (403, 1), (302, 1)])
def test_a_webhook_that_refuses_is_a_reason_without_its_address(webhook, status, tries):
    server = webhook(status)
    problem = post_webhook(server.url, {"text": "hello"})
    assert str(status) in problem
    assert "SECRET" not in problem
    assert len(server.posts) == tries


def test_nobody_there_is_a_reason_and_the_alert_is_kept(store, webhook):
    server = webhook(200)
    server.shutdown()
    server.server_close()
    report = run_alerts(store.pin(), RUN, [Alert("good", "SELECT 1")], store.uri, server.url)
    assert report.as_json()["raised"] == {"good": 1}
    assert "was not posted" in report.as_json()["stopped"]
    assert "SECRET" not in report.as_json()["stopped"]


def test_queries_are_read_by_their_names(tmp_path):
    file = tmp_path / "alerts.sql"
    file.write_text("-- ours\n\n-- name: one\nSELECT 1;\n-- a note\n--  name:  the second \nSELECT ';'\n")
    one, two = read_alerts(str(file))
    assert (one.name, two.name) == ("one", "the second")
    assert "SELECT 1" in one.sql


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("", "without a name"),
        ("SELECT 1;\n-- name: a\nSELECT 2", "without a name"),
        ("-- name: a\nSELECT 1;\n-- name: a\nSELECT 2", "same name"),
        ("-- name: a\nSELECT 1; SELECT 2", "'a' must be one SELECT"),
        ("-- name: a\nDROP VIEW videos", "'a' must be one SELECT"),
        ("-- name: a\nSELEC 1", "'a' must be one SELECT"),
        ("-- name: a\n-- nothing\n", "'a' must be one SELECT"),
    ],
)
def test_wrong_files_are_sentences(tmp_path, text, says):
    file = tmp_path / "alerts.sql"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=says):
        read_alerts(str(file))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "hooks.example.com/SECRET", "https://"])
def test_a_webhook_is_an_http_address(url):
    with pytest.raises(InputError) as refused:
        check_webhook(url)
    assert "SECRET" not in str(refused.value)


def night(day, **parts):
    seq = (day * 24 + 2) * 3600 * 10**6
    good = {"index": {"indexed": 9, "failed": 0, "not_attempted": 0, "failures": {}, "stopped": None}}
    return {**RUN, "run_id": f"night-{day}", "seq": seq, "counts": json.dumps({**good, **parts})}


def index_part(**counts):
    return {"indexed": 0, "failed": 0, "not_attempted": 0, "failures": {}, "stopped": None, **counts}


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ({}, None),
        ({"index": index_part(stopped="the bucket is gone")}, "stopped"),
        ({"maintain": {"stopped": "OSError"}}, "stopped"),
        ({"index": index_part(indexed=9, failed=1, failures={"truncated": 1})}, "twentieth"),
        ({"answer": {"asked": 30, "reused": 10, "not_attempted": 0, "failed": 3}}, "tenth"),
        ({"answer": {"asked": 30, "reused": 0, "not_attempted": 0, "failed": 3}}, None),
        ({"index": {"stopped": None}, "answer": {"out_of_time": True}}, None),
    ],
)
def test_what_comes_with_the_project_raises_when_it_should(store, parts, name):
    raised = run_alerts(store.pin(), night(100, **parts), read_alerts(None), store.uri, None)
    assert raised.problems == []
    assert len(raised.raised) == (name is not None)
    assert all(name in key for key in raised.raised)


def test_three_days_without_a_video_are_an_alert(store):
    import pyarrow as pa

    from longvlm.schemas import tables

    waiting = index_part(not_attempted=5)

    def raised(nights):
        for each in nights[:-1]:
            row = written(store, pa.Table.from_pylist([each], tables.RUNS))
            delta.commit(store.handle("runs"), [delta.add_action(row)])
        return run_alerts(store.pin(("videos", "runs")), nights[-1], read_alerts(None), store.uri, None).raised

    assert raised([night(100), night(101, index=waiting), night(102, index=waiting)]) == {}
    (name,) = raised([night(103, index=waiting), night(104, index=waiting)])
    assert "three days" in name
    assert raised([night(105), night(106, index=waiting)]) == {}


def written(store, rows):
    from longvlm.pipeline.store.files import write_parquet

    return write_parquet(store.uri, "runs", rows)


def test_they_run_on_a_store_that_holds_nothing():
    assert run_alerts(Snapshot(), night(1), read_alerts(None), "nowhere", None).as_json()["num_raised"] == 0
