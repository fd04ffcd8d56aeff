import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import stores

from longvlm.jobs.cluster import logs
from longvlm.jobs.cluster.executor import Stage
from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.jobs.index.stages import Watch
from longvlm.pipeline.source.corpus import Source
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError


def said(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a clip.mp4", "s3://bucket/a clip.mp4"),
        ("/videos/what?.mp4", "/videos/what?.mp4"),
        ("https://me:pa@ss@host/a.mp4", "https://host/a.mp4"),
        ("https://token@host:9000/a.mp4?X-Amz-Signature=abc&b=1#x", "https://host:9000/a.mp4?..."),
        ("GET 'http://h/a b.mp4?sig=1%2B' failed (403)", "GET 'http://h/a b.mp4?...' failed (403)"),
        ("no address, mail me@home", "no address, mail me@home"),
    ],
)
def test_addresses_lose_their_credentials_and_nothing_else(text, shown):
    assert logs.redact(text) == shown


def test_a_failed_video_is_one_line_with_its_code(driver, capsys):
    driver.setenv("LONGVLM_LOG", "warning")
    logs.start_driver()
    logs.begun("index", "run-1", source="s3://bucket")
    good = {"run_id": "run-1", "video_id": "v1", "uri": "/a.mp4", "error_code": None, "error": None}
    bad = {**good, "uri": "https://u:p@h/b.mp4", "error_code": "truncated", "error": "https://u:p@h/b.mp4 ends early"}
    logs.failures([good, bad])
    (line,) = said(capsys)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "run_id": "run-1",
        "video_id": "v1",
        "uri": "https://h/b.mp4",
        "error_code": "truncated",
        "message": "https://h/b.mp4 ends early",
    }


def test_a_run_says_when_it_begins_commits_and_ends(driver, capsys):
    driver.setenv("LONGVLM_LOG", "INFO")
    logs.start_driver()
    logs.start_driver()  # said twice, written once
    logs.begun("index", "run-1", source="https://u:p@h/videos", store="/s")
    logs.committed("index", "run-1", 3)
    logs.ended("index", "run-1", {"indexed": 3}, None)
    logs.ended("answer", "run-2", {}, "interrupted")
    lines = said(capsys)
    assert [line["message"] for line in lines] == [
        "index begins: source https://h/videos, store /s",
        "committed 3 rows",
        "index ended",
        "answer stopped: interrupted",
    ]
    assert [line["run_id"] for line in lines] == ["run-1", "run-1", "run-1", "run-2"]
    assert lines[2]["counts"] == {"indexed": 3}
    assert lines[3]["level"] == "warning"


def test_an_exception_comes_with_its_traceback(driver, capsys):
    driver.setenv("LONGVLM_LOG", "info")
    logs.start_driver()
    try:
        int("https://u:p@h/a.mp4")
    except ValueError:
        logs.log.exception("it broke")
    (line,) = said(capsys)
    assert "'https://h/a.mp4'" in line["traceback"]


def test_a_wrong_level_is_refused_and_none_is_silence(driver, capsys):
    driver.setenv("LONGVLM_LOG", "loud")
    with pytest.raises(InputError, match="loud"):
        logs.start_driver()
    driver.delenv("LONGVLM_LOG")
    logs.start_driver()
    logs.log.error("nobody asked")
    assert capsys.readouterr().err == ""


@pytest.fixture
def broken(tmp_path):
    """A folder with one file that is no video."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"\x00" * 100)
    return tmp_path / "videos"


def test_a_run_logs_what_failed(tmp_path, broken, model, driver, capsys):
    order = IndexOrder(Source(str(broken)), str(tmp_path / "store"), model=model, recipe="tiny")
    driver.setenv("LONGVLM_LOG", "info")
    logs.start_driver()
    report = run_index(order)
    assert report.counts.failed == 1
    begun, _, committed, failed, ended = said(capsys)  # here the stage speaks on the same line
    assert begun["message"].startswith("index begins: source")
    assert failed["uri"].endswith("broken.mp4")
    assert failed["error_code"] in report.counts.failures
    assert committed["message"] == "committed 1 rows"
    assert ended["counts"]["failed"] == 1
    assert {line["run_id"] for line in (begun, failed, committed, ended)} == {report.run_id}


@pytest.mark.usefixtures("on_ray")
def test_a_worker_logs_what_failed(broken):
    executor = open_executor("local")
    tally = executor.start_tally("run-of-the-logs")
    video = {"video_id": "v", "write_id": "w", "uri": str(broken / "broken.mp4"), "attempts": 0}
    plan = pa.Table.from_pylist([video], tables.PLAN)
    (frames,) = executor.run([plan], [Stage(Watch, (stores.TINY.spec(), tally), None, 1, 0.5)])
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    texts = [file.read_text() for file in (session / "logs").glob("worker-*.err")]
    (line,) = [json.loads(line) for text in texts for line in text.splitlines() if "run-of-the-logs" in line]
    assert (line["level"], line["stage"], line["video_id"]) == ("warning", "decode", "v")
    assert line["error_code"] == frames["error_code"][0].as_py()


def test_the_command_line_logs_only_where_it_is_told_to(tmp_path):
    def status(level):
        command = [sys.executable, "-m", "longvlm", "status", "--store", str(tmp_path)]
        return subprocess.run(command, env=os.environ | level, capture_output=True, text=True, check=False)

    assert "there is no store" in status({}).stderr
    assert "LONGVLM_LOG" in status({"LONGVLM_LOG": "loud"}).stderr
