"""Standard output that takes no more, or not every character, and what other threads say."""

import io
import os
import resource
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager

import click
import pytest
import stores

from longvlm.jobs.options import say
from longvlm.jobs.own_output import OwnOutput, own_output
from longvlm.pipeline.store.ledger import Store


@contextmanager
def unread():
    """A file that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        yield file


@contextmanager
def full():
    """A file that there is no room for."""
    with tempfile.TemporaryFile("w") as file:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield file
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def print_rows():
    for _ in range(10_000):
        sys.stdout.write("a row\n")


@pytest.mark.parametrize("body", [print_rows, lambda: click.echo("a row"), lambda: sys.stdout.write("a row\n")])
@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (unread, ""),
        (full, "longvlm: standard output cannot be written (File too large); make room, or send it elsewhere.\n"),
    ],
)
def test_standard_output_that_takes_no_more_ends_a_command(monkeypatch, capsys, body, lost, said):
    with lost() as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as left, own_output():
            body()
        stdout.flush()  # as Python does at the end
    assert left.value.code == 1
    assert capsys.readouterr().err == said


def test_a_pipe_of_somebody_elses_is_no_standard_output(capfd):
    with pytest.raises(BrokenPipeError), own_output():
        raise BrokenPipeError(32, "the server hung up")
    assert capfd.readouterr() == ("", "")


def test_standard_output_that_was_closed_before_takes_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with own_output():
        click.echo("a row")


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with own_output():
        sys.stdout.write("日本 a\n")
        click.echo("é")
        click.echo("日".encode())  # as what completes a shell's words does
        say("\udce9")
    assert raw.getvalue() == b"\\u65e5\\u672c a\n\\xe9\n\\u65e5\n\\xe9\n"


def test_what_other_threads_print_stays_out_of_what_machines_read(capsys):
    shown = OwnOutput(sys.stdout)
    talker = threading.Thread(target=print, args=("a worker died",), kwargs={"file": shown})
    talker.start()
    talker.join()
    print("{}", file=shown)
    out, err = capsys.readouterr()
    assert (out, err) == ("{}\n", "a worker died\n")


def test_a_pipe_that_closes_and_a_terminal_of_ascii(tmp_path):
    """The whole of it, once."""
    made = Store.create(str(tmp_path / "store"))
    made.register_recipe(stores.LONG, "some/model")
    stores.index(made, ["日本語"])
    script = f"""
        "{sys.executable}" -m longvlm sql --quiet --store store "SELECT * FROM range(1000000)" --csv | head -1
        echo "${{PIPESTATUS[@]}}"
        export PYTHONIOENCODING=ascii
        "{sys.executable}" -m longvlm sql --quiet --store store "SELECT right(uri, 7) AS x FROM videos"
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, check=False, timeout=120)
    assert done.stderr == b""
    assert done.stdout.decode("ascii").startswith("range\n1 0\n+-")
    assert r"| \u65e5\u672c\u8a9e.mp4 |" in done.stdout.decode("ascii")
