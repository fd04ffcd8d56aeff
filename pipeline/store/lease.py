"""A lease on a store: at most one holder of a name at a time, on any disk or bucket, with no service behind it.

`STORE/leases/NAME/000000012.json` is generation 12 of a lease and says who has it until when. The highest generation
counts. Taking, renewing and giving back are one and the same act: to create the next generation, which a store lets
only one of many do (an object by a conditional put, a local file by a hard link, as Delta's log does). Only older
generations are ever removed, and whoever created one looks whether it is the highest, so that somebody who fell asleep
between looking and creating finds out.

Whether a claim has run out is decided by the store's own clock: a file that is made now is held against the newest
generation. The times in a claim are of its holder's clock, and only told. A claim that cannot be read, as a power cut
may leave one, runs out likewise. The tables of a store are safe without any lease; it saves doing work twice.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longvlm.pipeline.store.files import canonical, filesystem
from longvlm.pipeline.uris import is_local
from longvlm.schemas import clock
from longvlm.schemas.errors import InputError

EXPIRY_S = 900.0  # after this long without a renewal it may be taken over
RENEWALS = 3  # in that time
_RETRY_S = 15.0  # when a renewal did not get through


@dataclass(frozen=True)
class Claim:
    """One generation of a lease: whose it is and until when (seconds since the epoch; 0 once it was given back)."""

    holder: str  # one process, by a name that nobody else has
    host: str
    since_s: float
    until_s: float
    expiry_s: float = EXPIRY_S  # for which it holds, from when its file was made


class LeaseHeldError(Exception):
    """Somebody else has the lease."""

    def __init__(self, claim: Claim) -> None:
        super().__init__(claim)
        self.claim = claim

    def __str__(self) -> str:
        """Who has it, and since when."""
        if not self.claim.holder:
            return f"a claim that cannot be read is there; it runs out {EXPIRY_S / 60:.0f} minutes after it was written"
        since, until = (time.strftime("%H:%M", time.gmtime(s)) for s in (self.claim.since_s, self.claim.until_s))
        return f"one has been running on {self.claim.host} since {since} UTC and has the store until {until} at least"


class Lease:
    """Holds a lease while its body runs, renewing it from a thread of its own.

    Args:
        store_uri: the store; it need not exist yet.
        name: of the lease.
        on_loss: called from that thread when somebody else took the lease, or nobody can say any more who has it.
        stalled: why the work is at a standstill, where it is; then the lease is renewed no more, as if it were lost.
        expiry_s: how long a holder that was killed keeps others away.

    Entering raises LeaseHeldError, or InputError where the store cannot be written.
    """

    def __init__(
        self,
        store_uri: str,
        name: str,
        on_loss: Callable[[], None],
        stalled: Callable[[], str | None] = lambda: None,
        *,
        expiry_s: float = EXPIRY_S,
    ) -> None:
        self.folder = f"{canonical(store_uri)}/leases/{name}"
        self.on_loss = on_loss
        self.stalled = stalled
        self.expiry_s = expiry_s
        self.lost: str | None = None  # why it is not ours any more
        self._claim = Claim(uuid.uuid4().hex, socket.gethostname(), clock.now_s(), 0.0, expiry_s)
        self._generation = 0
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name=f"lease {name}", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease."""
        try:
            self._take()
        except (InputError, LeaseHeldError):
            raise
        except Exception as error:  # every cloud library has exceptions of its own
            raise InputError(
                f"no lease can be taken in {self.folder} ({type(error).__name__}: {error}); check the store's address "
                "and your rights."
            ) from error
        self._keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lease back, if it is still ours."""
        self._ended.set()
        self._keeper.join()
        if not self.lost:
            self._advance(until_s=0.0)

    def _take(self) -> None:
        self._generation, present = newest(self.folder)
        if present and present.until_s and _age_s(self.folder, self._generation) < present.expiry_s:
            raise LeaseHeldError(present)
        if not self._advance(until_s=clock.now_s() + self.expiry_s):
            _, present = newest(self.folder)
            raise LeaseHeldError(present or self._claim)

    def _keep(self) -> None:
        wait_s = self.expiry_s / RENEWALS
        while not self._ended.wait(wait_s):
            if why := self.stalled():
                self.lost = why
                self.on_loss()
                return
            try:
                is_ours = self._advance(until_s=clock.now_s() + self.expiry_s)
                wait_s, problem = self.expiry_s / RENEWALS, "another run took over the lease"
            except Exception as error:  # noqa: BLE001 - whatever kept it from the store, it may get through next time
                is_ours = clock.now_s() < self._claim.until_s
                wait_s, problem = min(_RETRY_S, wait_s), f"the lease could not be renewed ({error})"
            if not is_ours:
                self.lost = problem
                self.on_loss()
                return

    def _advance(self, until_s: float) -> bool:
        """Create the next generation; False if somebody else did."""
        claim = replace(self._claim, until_s=until_s)
        mine = self._generation + 1
        if not create(_path(self.folder, mine), json.dumps(asdict(claim)).encode()):
            found = _read(_path(self.folder, mine))
            if found is None or found.holder != claim.holder:
                return False
            self._generation = mine  # it was created before, and only the answer did not come through
            return self._advance(until_s)
        generations = _generations(self.folder)
        if generations[-1:] != [mine]:
            _remove(self.folder, [mine])
            return False
        self._generation, self._claim = mine, claim
        _remove(self.folder, generations[:-1])
        return True


def newest(folder: str) -> tuple[int, Claim | None]:
    """The highest generation of a lease and what it says; 0 and None before the first."""
    while True:
        generation = max(_generations(folder), default=0)
        claim = _read(_path(folder, generation)) if generation else None
        if claim or not generation:
            return generation, claim  # else it was renewed, and this one removed, between listing and reading


def create(uri: str, content: bytes) -> bool:
    """Create a file with its content at once, unless there is one; False if there is.

    Raises what the file system raises. A bucket that takes a conditional put and does not heed the condition would
    let several succeed; `longvlm doctor` tries that.
    """
    fs, path = filesystem(uri)
    if is_local(uri):
        return _create_local(Path(path), content)
    try:
        fs.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    except Exception:  # some libraries have another exception for it
        fs.invalidate_cache()
        if not fs.exists(path):
            raise
        return False
    return True


def _create_local(path: Path, content: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{uuid.uuid4()}.draft")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _path(folder: str, generation: int) -> str:
    return f"{folder}/{generation:09}.json"


def _generations(folder: str) -> list[int]:
    fs, path = filesystem(folder)
    fs.invalidate_cache()
    try:
        found: list[Any] = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    names = [name.rpartition("/")[2].removesuffix(".json") for name in found]
    return sorted(int(name) for name in names if name.isdigit())


def _read(uri: str) -> Claim | None:
    fs, path = filesystem(uri)
    try:
        return Claim(**json.loads(fs.cat_file(path)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # cut off, or of another kind
        return Claim("", "", 0.0, 1.0)


def _age_s(folder: str, generation: int) -> float:
    """How long ago a generation was made, by the store's clock; 0 if it was renewed meanwhile."""
    fs, path = filesystem(_path(folder, generation))
    probe = f"{path.rpartition('/')[0]}/{uuid.uuid4()}.draft"
    fs.pipe_file(probe, b"")
    fs.invalidate_cache()
    try:
        age: float = (fs.modified(probe) - fs.modified(path)).total_seconds()
    except FileNotFoundError:
        return 0.0
    finally:
        fs.rm_file(probe)
    return age


def _remove(folder: str, generations: list[int]) -> None:
    for generation in generations:
        fs, path = filesystem(_path(folder, generation))
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            continue  # the next holder was quicker
