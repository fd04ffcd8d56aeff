import pytest

from longvlm.jobs.cluster.executor import InProcess
from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.cluster.tally import StageReporter, Tally


@pytest.fixture(params=["on_ray", "in process"])
def start_tally(request):
    """Makes tallies: of actors of Ray, or of this process."""
    if request.param == "in process":
        return InProcess().start_tally
    request.getfixturevalue("ray_session")
    return open_executor("local").start_tally


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


def test_a_stage_times_its_calls_and_reports_them(start_tally):
    tally = start_tally("test")
    stage = StageReporter("decode", tally)
    with stage.work(["video"]) as clock:
        assert stage.attempts(["video"]) == [1]
        assert clock.time(sum, range(10_000)) == 49_995_000
    report = tally.report()["decode"]
    assert report["done"] == 1
    assert report["busy_s"] > 0
    assert stage.attempts(["video"]) == [0]
    assert tally.begun_s() is not None


def test_tokens_are_counted_without_keys(start_tally):
    tally = start_tally("tokens")
    for tokens, seconds in ((300, 0.5), (200, 0.25)):
        StageReporter("prefill", tally).add_tokens(tokens, seconds)
    assert tally.report() == {"prefill": {"done": 500, "workers": 1, "busy_s": 0.75, "cpu_s": 0.0}}


@pytest.mark.usefixtures("on_ray")
def test_only_worker_processes_log_for_the_run_of_a_tally():
    assert open_executor("local").start_tally("mine").worker_run_id() == "mine"
    assert InProcess().start_tally("mine").worker_run_id() is None


def test_work_that_comes_back_in_parts_is_finished_part_by_part():
    stage = StageReporter("answer", Tally())
    stage.begin(["a", "b"])
    stage.finish(["b"], 1.0, 0.5)
    assert stage.attempts(["a", "b"]) == [1, 0]
