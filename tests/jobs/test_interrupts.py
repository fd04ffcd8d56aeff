"""Ctrl-C ends a command in one line and with 130, wherever it is at."""

import signal
import subprocess
import sys
import threading

import pytest

from longvlm.jobs.interrupts import CTRL_C, ended_by_ctrl_c, is_interrupt

ENDLESS = "SELECT count(*) FROM range(4000000000) a, range(5000) b"  # DuckDB does not look at signals in it
LOADING = """
import os, signal, sys
class Press:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
sys.argv = ["longvlm", "sql", "--store", {store!r}, "FROM videos", "--quiet"]
from longvlm.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["click", "longvlm.jobs.query.sql", "duckdb"])
def test_ctrl_c_while_modules_are_loaded_is_one_line(indexed, module):
    code = LOADING.format(module=module, store=indexed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (CTRL_C, "", "longvlm: interrupted.\n")


@pytest.mark.parametrize("query", ["SELECT count(*) FROM range(100000000000)", ENDLESS], ids=["long", "endless"])
def test_ctrl_c_ends_a_query(indexed, query):
    code = f"""
import signal, threading, longvlm.jobs.query.results as room, longvlm.jobs.cli as cli
run = room.print_results
def print_results(*args):  # pressed when the query is at work
    threading.Timer(1.0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    return run(*args)
room.print_results = print_results
cli.main(["sql", "--store", {indexed!r}, {query!r}, "--quiet"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (CTRL_C, "", "longvlm: interrupted.\n")


def test_ctrl_c_in_a_text_that_a_library_runs_ends_like_any_other(indexed, tmp_path):
    """Python ends a module by the signal after that, unless it runs another text."""
    code = f"""
import longvlm.jobs.cli as cli
import longvlm.jobs.query.results as room
def print_results(*_):
    exec("import signal; signal.raise_signal(signal.SIGINT)")  # as dataclasses do
room.print_results = print_results
cli.main(["sql", "--store", {indexed!r}, "FROM videos", "--quiet"])
"""
    (tmp_path / "pressed.py").write_text(code)
    command = [sys.executable, "-m", "pressed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (CTRL_C, "longvlm: interrupted.\n")


def test_ctrl_c_that_python_drops_in_a_callback_is_heard_all_the_same(indexed):
    code = f"""
import signal, time, weakref
import longvlm.jobs.cli as cli
import longvlm.jobs.query.results as room
class Thing: pass
def print_results(*_):
    thing = Thing()
    kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))  # as while libraries are loaded
    del thing
    time.sleep(60)
room.print_results = print_results
cli.main(["sql", "--store", {indexed!r}, "FROM videos", "--quiet"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (CTRL_C, "longvlm: interrupted.\n")


def test_a_body_that_ends_by_itself_leaves_nothing_behind():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ended_by_ctrl_c():
        signal.raise_signal(signal.SIGINT)
    assert threading.active_count() == before
    assert signal.set_wakeup_fd(-1) == -1


def test_duckdbs_word_for_ctrl_c_is_known():
    assert is_interrupt(RuntimeError("Query interrupted"))
    assert not is_interrupt(RuntimeError("anything else"))
