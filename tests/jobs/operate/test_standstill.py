import threading
import time

import pytest

from longvlm.jobs.operate.standstill import Standstill

pytestmark = pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="this system cannot tell")


def looked_at(work, limit_s=0.3):
    """What is said of the main thread while it works, every tenth of a second."""
    said, ended, standstill = [], threading.Event(), Standstill(limit_s)

    def look():
        while not ended.wait(0.1):
            said.append(standstill())

    looker = threading.Thread(target=look)
    looker.start()
    work()
    ended.set()
    looker.join()
    return said


def test_a_thread_that_waits_is_told_and_where():
    said = looked_at(lambda: time.sleep(2.0))
    assert said[0] is None
    assert said[-1].startswith("nothing has moved for 0 minutes; it waits in <lambda> of ")
    assert said[-1].endswith("test_standstill.py")


def test_one_that_computes_or_waits_for_short_is_not():
    def work():
        ends = time.process_time() + 0.5
        while time.process_time() < ends:
            sum(range(100_000))

    assert set(looked_at(work, limit_s=5.0)) == {None}
