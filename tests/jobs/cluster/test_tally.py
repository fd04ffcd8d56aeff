import gc

import pytest

from longvlm.jobs.cluster.executor import InProcess
from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.cluster.resources import COLLECT_EVERY
from longvlm.jobs.cluster.tally import StageReporter, Tally


@pytest.fixture(scope="module", params=["on_ray", "in process"])
def tally(request):
    """Of a run: in an actor of Ray, or in this process."""
    if request.param == "in process":
        return InProcess().start_tally("mine")
    request.getfixturevalue("ray_session")
    return open_executor("local").start_tally("mine")


def test_only_work_that_was_not_finished_counts_as_an_attempt():
    tally = Tally()
    tally.begin("encode", ["a", "b"])
    tally.begin("encode", ["a"])
    assert tally.attempts("encode", ["a", "b", "c"]) == [2, 1, 0]
    assert tally.attempts("decode", ["a"]) == [0]
    tally.finish("encode", ["a", "b"], worker="w1", busy_s=2.0, cpu_s=1.0)
    assert tally.attempts("encode", ["a", "b"]) == [0, 0]
    assert tally.report() == {
        "encode": {"done": 2, "workers": 1, "busy_s": 2.0, "cpu_s": 1.0},
        "decode": {"done": 0, "workers": 0, "busy_s": 0.0, "cpu_s": 0.0},
    }


def test_a_stage_times_its_calls_and_reports_them(tally):
    stage = StageReporter("decode", tally)
    with stage.work(["video"]) as clock:
        assert stage.attempts(["video"]) == [1]
        assert clock.time(sum, range(10_000)) == 49_995_000
    report = tally.report()["decode"]
    assert report["done"] == 1
    assert report["busy_s"] > 0
    assert stage.attempts(["video"]) == [0]
    assert tally.begun_s() is not None


def test_tokens_are_counted_without_keys(tally):
    for tokens, seconds in ((300, 0.5), (200, 0.25)):
        StageReporter("prefill", tally).add_tokens(tokens, seconds)
    assert tally.report()["prefill"] == {"done": 500, "workers": 1, "busy_s": 0.75, "cpu_s": 0.0}


@pytest.mark.usefixtures("driver")
def test_only_worker_processes_log_for_the_run_of_a_tally_and_seldom_look_for_cycles(tally):
    """The driver logs as it is told, and its process is its user's."""
    is_worker = not isinstance(tally, Tally)
    before = gc.get_threshold()
    try:
        StageReporter("decode", tally).start_worker()
        assert tally.worker_run_id() == ("mine" if is_worker else None)
        assert gc.get_threshold() == ((COLLECT_EVERY, *before[1:]) if is_worker else before)
    finally:
        gc.set_threshold(*before)


def test_work_that_comes_back_in_parts_is_finished_part_by_part():
    stage = StageReporter("answer", Tally())
    stage.begin(["a", "b"])
    stage.finish(["b"], 1.0, 0.5)
    assert stage.attempts(["a", "b"]) == [1, 0]
