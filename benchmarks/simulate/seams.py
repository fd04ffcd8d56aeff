"""What of the project the world comes in between at: the clock, the files and the logs of a store."""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem

from benchmarks.simulate.world import Killed, Simulation
from longvlm.pipeline.store import catalog, delta, files, lease
from longvlm.pipeline.uris import locate
from longvlm.schemas import clock


@contextmanager
def simulated(world: Simulation) -> Iterator[None]:
    """Put the project into a world: its clock, its files, its logs and its lots."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, stand_in: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, stand_in))

        put(clock, "time_ns", world.time_ns)
        put(time, "sleep", _sleeping(world, time.sleep))
        put(os, "urandom", _drawing(world, os.urandom))
        put(uuid, "uuid4", world.new_uuid)
        put(files, "locate", _locating(world, locate))
        for name in ("open_table", "refresh"):
            put(delta, name, _on_point(world, getattr(delta, name)))
        for name in ("commit", "create_table", "add_columns"):
            put(delta, name, _on_point(world, getattr(delta, name), writes=True))
        put(delta, "DeltaTable", _LongMemory)
        put(delta, "stale_files", _seen_from_there(delta.stale_files))
        put(lease, "create", _creating(world, lease.create))
        put(lease.Lease, "_keep", lambda _: None)  # time goes by in turns: nobody can renew meanwhile
        # So that replays are exact; what this process had before, and will have afterwards, is none of the world's.
        stack.enter_context(mock.patch.dict(catalog._SETTINGS, threads=1))  # noqa: SLF001
        for remembered in (catalog._database, catalog.recipe_rows):  # noqa: SLF001
            stack.callback(remembered.cache_clear)
            remembered.cache_clear()
        yield


class WatchedFiles(LocalFileSystem):
    """Local files as the world has them: every call is a point, and times of change are the world's."""

    cachable = False

    def __init__(self, world: Simulation) -> None:
        super().__init__()
        self.world = world

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if "r" in mode:
            return self.world.point(lambda: LocalFileSystem._open(self, path, mode, block_size, **options))  # noqa: SLF001
        return self.world.point(lambda: _Sink(self, path, mode), writes=True)

    def rm_file(self, path: str) -> None:
        """A point, and then the file is gone."""
        self.world.point(lambda: LocalFileSystem.rm_file(self, path), writes=True)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:  # noqa: FBT001, FBT002 - fsspec's own
        """A point, and then what is there, in one order."""
        found = self.world.point(lambda: LocalFileSystem.ls(self, path, detail=detail, **options))
        return sorted(found, key=lambda one: one["name"] if detail else one)

    def exists(self, path: str, **options: Any) -> bool:
        """A point, and then whether a file is there."""
        return bool(self.world.point(lambda: LocalFileSystem.exists(self, path, **options)))

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        """A point, and then the file has another name."""
        self.world.point(lambda: LocalFileSystem.mv(self, path1, path2, **options), writes=True)

    def modified(self, path: str) -> Any:
        """A point, and then when the file was changed last."""
        return self.world.point(lambda: LocalFileSystem.modified(self, path))


class _Sink(LocalFileOpener):
    """A file that is being written, of which half is there if its writer is killed before it is closed."""

    def __init__(self, fs: WatchedFiles, path: str, mode: str) -> None:
        super().__init__(path, mode, fs=fs)
        self.world = fs.world

    def close(self) -> None:
        """A point, and then the file is whole."""
        if self.f.closed:
            return
        try:
            self.world.point(self.f.close, writes=True)
        except (Killed, OSError):
            self.f.close()
            os.truncate(self.path, Path(self.path).stat().st_size // 2)
            raise
        finally:
            _stamp(self.world, self.path)

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class _LongMemory(DeltaTable):
    """A table whose log remembers for years what it dropped, because by this machine's clock all was years ago."""

    @classmethod
    def create(cls, *args: Any, **options: Any) -> DeltaTable:
        """A table as the project makes it."""
        options["configuration"] |= {"delta.deletedFileRetentionDuration": "interval 2000 days"}
        return DeltaTable.create(*args, **options)


def _stamp(world: Simulation, path: str) -> None:
    if not world.is_remote:  # a bucket asks the world itself
        os.utime(path, (world.true_s(),) * 2)


def _locating(world: Simulation, found: Callable[[str], tuple[Any, str]]) -> Callable[[str], tuple[Any, str]]:
    return lambda uri: (WatchedFiles(world), found(uri)[1])


def _on_point(world: Simulation, call: Callable[..., Any], *, writes: bool = False) -> Callable[..., Any]:
    # a store that took a commit and whose answer is lost is asked again by the client, and says that it is there
    lost = partial(CommitFailedError, "the answer was lost")
    return lambda *args: world.point(lambda: call(*args), writes=writes, refusal=lost)


def _creating(world: Simulation, create: Callable[[str, bytes], bool]) -> Callable[[str, bytes], bool]:
    def stamped(uri: str, content: bytes) -> bool:
        is_new = create(uri, content)
        if is_new:
            _stamp(world, uri)
        return is_new

    return lambda uri, content: world.point(lambda: stamped(uri, content), writes=True)


def _seen_from_there(stale_files: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Delta's library has no clock but the machine's: it is told how much longer ago the world's retention is."""

    def seen(uri: str, handle: Any, hours: int, *, full: bool) -> list[str]:
        later_hours = int((time.time() - clock.now_s()) / 3600)
        return stale_files(uri, handle, hours + later_hours, full=full)

    return seen


def _sleeping(world: Simulation, sleep: Callable[[float], None]) -> Callable[[float], None]:
    def asleep(seconds: float) -> None:
        if world.actor() is None:
            sleep(seconds)
        else:
            world.point(lambda: world.go_by(seconds / 3600))

    return asleep


def _drawing(world: Simulation, urandom: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return lambda size: urandom(size) if world.actor() is None else world.chance.randbytes(size)
