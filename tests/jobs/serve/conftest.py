"""A store with videos of the tiny world and hostile ones, and a real server over it."""

import json
from datetime import datetime

import pyarrow as pa
import pytest
import stores
from servers import LARGE_BYTES, LARGE_NAME, SCRIPT, SCRIPT_NAME, PagesServer

from clips import write_clip
from longvlm import tinyworld
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.tinyworld.world import make_world

QUESTION = "is there a ring?"
CREATED = datetime(2026, 1, 2)  # noqa: DTZ001 - naive UTC, as stores have it
EVIDENCE = [{"start_s": 6.0, "end_s": 8.0, "weight": 0.7}, {"start_s": 2.0, "end_s": 4.0, "weight": 0.3}]


def answer(video, model, said, **columns):
    row = {name: video[name] for name in ("video_id", "uri", "write_id")}
    row |= {"question": QUESTION, "question_id": "ring", "question_hash": "h1", "type": "bool", "run_id": "r"}
    row |= {"answer": said, "value": "true", "confidence": 0.9, "status": "answered", "model": model}
    row |= {"answer_recipe": model, "num_visual_tokens": 68, "evidence": EVIDENCE, "created_at": CREATED}
    return {**row, **columns}


def night(number):
    parts = {"index": {"indexed": 10 * number, "failed": number}, "answer": {"answered": 7, "stopped": None}}
    raised = {"raised": {"many failures": number}} if number else {"raised": {}}
    counts = {**parts, "alerts": raised, "stopped": None, "wall_s": 60.0 + number}
    return {"run_id": f"night-{number}", "job": "nightly", "counts": json.dumps(counts), "wall_s": 60.0 + number}


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """A store of five videos, one of which failed and one no browser plays, with answers of two models to one."""
    from longvlm.jobs.index.order import IndexOrder
    from longvlm.jobs.index.run import run_index
    from longvlm.pipeline.source.corpus import Source

    folder = tmp_path_factory.mktemp("shown")
    make_world(folder / "videos", 3, 2)
    (folder / "videos" / "questions.jsonl").unlink(missing_ok=True)
    write_clip(folder / "videos" / "hevc.mp4", 100, codec="libx265", size=(64, 64))
    write_clip(folder / "videos" / f"{SCRIPT_NAME}.mp4", 50)
    with (folder / "videos" / f"{LARGE_NAME}.mp4").open("ab") as file:
        file.write(LARGE_BYTES.to_bytes(4, "big") + b"free" + bytes(LARGE_BYTES - 8))
    (folder / "videos" / "broken.mp4").write_bytes(b"\0" * 5000)
    order = IndexOrder(
        Source(str(folder / "videos")), str(folder / "store"), model=tinyworld.MODEL, recipe=tinyworld.RECIPE,
        thumbnails=False, ray_address=IN_PROCESS,
    )  # fmt: skip
    assert run_index(order).counts.indexed == 4
    store = Store.open(str(folder / "store"))
    first, second, *_ = (video for video in stores.rows(store, "FROM videos ORDER BY uri") if "tiny-3" in video["uri"])
    rows = [
        answer(first, "some/model", "Yes"),
        answer(first, "other/model", "No", value="false", confidence=0.6),
        answer(second, "some/model", SCRIPT, value=None, confidence=None, evidence=[]),
        answer(second, "some/model", None, question=SCRIPT, question_hash="h2", status="failed", error=SCRIPT),
    ]
    store.append("answers", pa.Table.from_pylist(rows, tables.ANSWERS))
    store.append("runs", pa.Table.from_pylist([night(number) for number in range(3)], tables.RUNS))
    return folder


@pytest.fixture(scope="session")
def videos_by_name(shown):
    """The rows of the view videos, by the file's name without its end."""
    rows = stores.rows(str(shown / "store"), "FROM videos")
    return {row["uri"].rpartition("/")[2].removesuffix(".mp4"): row for row in rows}


@pytest.fixture(scope="session")
def server(shown):
    """A server over the store, for all tests: whatever they ask, it is there at the end and made no mistake.

    It writes and has a model; what it wrote is in the store for the tests that follow.
    """
    running = PagesServer("--store", str(shown / "store"), "--write", "anna", "--model", "tinyworld")
    yield running
    assert running.process.poll() is None
    assert "Traceback" not in running.stop()


@pytest.fixture(scope="session")
def impatient(shown):
    """A server over the same store that only reads, and waits for nobody for long."""
    limits = {"head_s": 1.0, "page_s": 4.0, "sql_s": 2.0, "request_s": 8.0, "wait_s": 0.3, "media_bytes": LARGE_BYTES}
    running = PagesServer("--store", str(shown / "store"), **limits)
    yield running
    assert running.process.poll() is None
    assert "Traceback" not in running.stop()
