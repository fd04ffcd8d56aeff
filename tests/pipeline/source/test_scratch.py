import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import pytest

from longvlm.pipeline.source import copies as objects
from longvlm.pipeline.source import scratch
from longvlm.pipeline.source.copies import local_copy
from longvlm.pipeline.source.scratch import ScratchFolder, await_room, draft_file, scratch_file, scratch_folder
from longvlm.schemas.errors import ErrorCode, TerminalError, TransientError
from support import ROOT

MB = 1 << 20
DISK = shutil.disk_usage("/")


@pytest.fixture
def mine(tmp_path):
    """The scratch folder of this decoder."""
    folder = ScratchFolder(str(tmp_path))
    yield folder.name
    folder.close()


@pytest.fixture
def disk(monkeypatch):
    """A disk of 100 MB whose free space is what the test says."""
    free = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DISK._replace(total=100 * MB, free=free[0]))
    monkeypatch.setattr(scratch, "_POLL_S", 0.01)
    monkeypatch.setattr(scratch, "WAIT_S", 0.2)
    return free


HOLD = """
import sys, time
from pathlib import Path
from longvlm.pipeline.source.scratch import ScratchFolder, scratch_file
folder = ScratchFolder(sys.argv[1])
with scratch_file(folder.name, ".mp4") as path:
    Path(path).write_bytes(bytes(1 << 20))
    print(path, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds a copy of 1 MB in a scratch folder of its own, and that copy."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def test_a_folder_goes_with_its_owner(tmp_path):
    folder = ScratchFolder(str(tmp_path))
    path = Path(folder.name)
    (path / "a").write_bytes(b"x")
    assert path.parent.stat().st_mode & 0o777 == 0o700
    del folder
    assert not path.exists()
    code = (
        "import sys; from longvlm.pipeline.source.scratch import ScratchFolder as S; f = S(sys.argv[1]); print(f.name)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert not Path(ended.stdout.strip()).exists()


def test_a_place_that_others_can_write_to_is_refused(tmp_path):
    root = tmp_path / f"longvlm-scratch-{os.getuid()}"
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    with pytest.raises(PermissionError, match="this user's alone"):
        ScratchFolder(str(tmp_path))
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="this user's alone"):
        ScratchFolder(str(tmp_path))


def test_a_file_is_there_as_long_as_it_is_needed(mine):
    with scratch_file(mine, ".mp4") as path:
        assert (Path(path).suffix, Path(path).parent, Path(path).read_bytes()) == (".mp4", Path(mine), b"")
    assert not any(Path(mine).iterdir())


def test_room_that_is_there_is_not_waited_for(mine, disk):
    disk[:] = [50 * MB]
    await_room(50 * MB, mine)


def test_what_is_larger_than_the_disk_never_fits(mine, disk):
    disk[:] = [100 * MB]
    with pytest.raises(TerminalError, match="more than the whole scratch disk") as caught:
        await_room(101 * MB, mine)
    assert caught.value.code == ErrorCode.TOO_LARGE


def test_a_disk_that_others_filled_is_not_waited_for(mine, disk, monkeypatch):
    disk[:] = [10 * MB]
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    with pytest.raises(TransientError, match="has no room for") as caught:
        await_room(20 * MB, mine)
    assert caught.value.code == ErrorCode.NO_SPACE


def test_what_other_decoders_hold_is_waited_for(mine, disk, other, monkeypatch):
    disk[:] = [10 * MB]
    monkeypatch.setattr(time, "sleep", lambda _: disk.__setitem__(0, 11 * MB))
    await_room(10 * MB + 1000, mine)
    assert other[1].exists()


def test_waiting_has_an_end(mine, disk, other):
    disk[:] = [10 * MB]
    with pytest.raises(TransientError) as caught:
        await_room(10 * MB + 1000, mine)
    assert caught.value.code == ErrorCode.NO_SPACE
    assert other[1].exists()


@pytest.mark.parametrize("by", ["waiting", "starting"])
def test_folders_of_processes_that_were_killed_are_removed(tmp_path, mine, disk, other, by):
    disk[:] = [10 * MB]
    process, path = other
    process.kill()
    process.wait()
    for age_s, left in ((0, True), (120, False)):
        os.utime(path.parent, (time.time() - age_s,) * 2)
        if by == "waiting":
            with pytest.raises(TransientError):
                await_room(20 * MB, mine)
        else:
            ScratchFolder(str(tmp_path)).close()
        assert path.exists() == left
        assert path.parent.exists() == left
    assert Path(mine).exists()


def test_a_folder_of_another_kind_has_no_neighbours(tmp_path, disk, monkeypatch):
    disk[:] = [10 * MB]
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited"))
    (tmp_path / "a").mkdir()
    with pytest.raises(TransientError):
        await_room(20 * MB, str(tmp_path / "a"))


def test_a_disk_that_fills_up_under_a_download_is_tried_again(mine, monkeypatch):
    memory = type(fsspec.filesystem("memory"))
    fsspec.filesystem("memory").pipe_file("/fetch/a.mp4", b"content")
    monkeypatch.setattr(objects, "_BACKOFF_S", 0.001)
    get_file, left = memory.get_file, []

    def full_at_first(fs, remote, path, **options):
        left.append(Path(path).stat().st_size)
        if len(left) <= objects.DOWNLOAD_TRIES + 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return get_file(fs, remote, path, **options)

    monkeypatch.setattr(memory, "get_file", full_at_first)
    with local_copy("memory://fetch/a.mp4", mine) as path:
        assert Path(path).read_bytes() == b"content"
    assert set(left) == {0}  # what it had got is given back before it waits
    left.clear()
    monkeypatch.setattr(objects, "WAIT_S", 0)
    with pytest.raises(TransientError) as caught, local_copy("memory://fetch/a.mp4", mine):
        pass
    assert caught.value.code == ErrorCode.NO_SPACE
    assert not any(Path(mine).iterdir())


def test_drafts_of_who_was_killed_go_when_the_next_is_made(tmp_path):
    old = time.time() - 3600
    for name in (".export-killed.duckdb", ".export-young.duckdb", "mine-killed.duckdb"):
        for path in (tmp_path / name, tmp_path / f"{name}.lock", tmp_path / f"{name}.wal"):
            path.write_bytes(b"x")
            if "killed" in name:
                os.utime(path, (old, old))
    held = tmp_path / ".export-held.duckdb"
    with draft_file(held):
        held.touch()
        os.utime(f"{held}.lock", (old, old))
        with draft_file(tmp_path / ".export-new.duckdb"):
            left = {path.name for path in tmp_path.glob("*.duckdb")}
    assert left == {".export-young.duckdb", "mine-killed.duckdb", ".export-held.duckdb"}
    assert {path.name.partition(".d")[0] for path in tmp_path.iterdir()} == {".export-young", "mine-killed"}


def test_a_draft_that_got_its_name_stays(tmp_path):
    with draft_file(tmp_path / ".export-x.duckdb"):
        (tmp_path / ".export-x.duckdb").touch()
        (tmp_path / ".export-x.duckdb").rename(tmp_path / "out.duckdb")
    assert [path.name for path in tmp_path.iterdir()] == ["out.duckdb"]


def test_the_scratch_folder_of_a_killed_driver_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, signal\nfrom longvlm.pipeline.source.scratch import scratch_folder\n"
    code += "with scratch_folder() as folder:\n    open(folder + '/listing.parquet', 'w').close()\n"
    code += "    os.utime(folder, (1, 1))\n    os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert list(tmp_path.rglob("listing.parquet"))
    with scratch_folder() as folder:
        assert not list(tmp_path.rglob("listing.parquet"))
    assert not os.path.exists(folder)  # noqa: PTH110 - a path as text
