"""The world that a history plays in: actors that take turns, their clocks, and the points where a turn may end."""

import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.simulate.turns import ACTORS, Ending

T = TypeVar("T")
_BEGINS_AGO_S = 600 * 86_400  # so that days may go by and all that is written lies in the past of this machine
_TICK_NS = 1_000_000  # what looking at the clock takes
_HANGS_S = 120.0
_LONG_NS = 47 * 3600 * 10**9  # a little less than files are kept for


class Killed(BaseException):
    """An actor is dead: no call of its job has any effect from here on."""


class Actor:
    """One machine of the world, which runs one job at a time in a thread that goes on only in its turns."""

    def __init__(self, world: "Simulation", number: int) -> None:
        self.world, self.number = world, number
        self.skew_s = 0.0
        self.job: str | None = None
        self.is_dead = False
        self.was_disturbed = False  # an answer was lost, or a write refused
        self.returned: Any = None
        self.error: BaseException | None = None
        self.was_overtaken = False  # files that it holds on to may be gone, as readers are told
        self._points: int | None = None
        self._ending: Ending = "pause"
        self._go = threading.Semaphore(0)
        self._requests = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether it has a job that waits for its next turn."""
        return self.job is not None

    def begin(self, job: str, call: Callable[[], Any]) -> None:
        """Begin a job, which waits for its first turn."""
        self.job, self.is_dead, self.was_disturbed, self.was_overtaken = job, False, False, False
        self.returned = self.error = None
        self._begun_ns = self.world.passed_ns
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def turn(self, points: int | None, ending: Ending) -> None:
        """Let the job go on for so many points; None: to its end."""
        self._points, self._ending = points, ending
        self.was_overtaken |= self.world.passed_ns - self._begun_ns > _LONG_NS
        if self.job in ("forget", "maintain", "nightly", "repair"):
            for other in self.world.actors:
                other.was_overtaken |= other is not self  # by what is deleted now; only a job that is under way minds
        self._go.release()
        if not self.world.baton.acquire(timeout=_HANGS_S):
            raise RuntimeError(f"the job {self.job} of actor {self.number} hangs")

    def requests(self, call: Callable[[], T], *, writes: bool, refusal: Callable[[], Exception]) -> T:
        """A request of the job, made by the thread of a server; others of the same job wait until it is answered."""
        with self._requests:
            if not self.is_busy:
                return call()
            self.world.num_points += 1
            return self.at_point(call, writes=writes, refusal=refusal)

    def at_point(self, call: Callable[[], T], *, writes: bool, refusal: Callable[[], Exception]) -> T:
        """A call that touches the world: what the turn says may come before it, or in place of its answer."""
        while self._points is not None and self._points <= 0 and not self.is_dead:
            match self._ending:
                case "kill":
                    self.is_dead = True
                case "pause":
                    self._wait()
                case ending:
                    if not writes:
                        break
                    self._points, self.was_disturbed = None, True
                    if ending == "lose":
                        call()
                    raise refusal()
        if self.is_dead:
            raise Killed
        if self._points is not None:
            self._points -= 1
        return call()

    def _wait(self) -> None:
        self.world.baton.release()
        self._go.acquire()

    def _run(self, call: Callable[[], Any]) -> None:
        self.world.actors_by_thread[threading.get_ident()] = self
        self._go.acquire()
        try:
            self.returned = call()
        except Killed as error:
            self.error = error.with_traceback(None)  # which would keep all that the job had
        except BaseException as error:  # noqa: BLE001 - the model judges it
            self.error = error
        finally:
            del self.world.actors_by_thread[threading.get_ident()]
            self.job = None
            self.world.baton.release()


class Simulation:
    """What all actors share.

    Args:
        folder: of this history alone; empty.
        seed: of names and of what stand-ins do.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.store = str(folder / "store")
        self.is_remote = False  # then every request is a point, and no call
        self.chance = random.Random(seed)
        self.begun_ns = time.time_ns() // 10**9 * 10**9 - _BEGINS_AGO_S * 10**9
        self.passed_ns = 0
        self.baton = threading.Semaphore(0)
        self.actors_by_thread: dict[int, Actor] = {}
        self.actors = [Actor(self, number) for number in range(ACTORS)]
        self.hurt: set[str] = set()  # files of the tables in which something rots
        self.num_points = 0
        self.is_at_peace = False  # nothing fails by itself any more

    def actor(self) -> Actor | None:
        """Whose thread this is."""
        return self.actors_by_thread.get(threading.get_ident())

    def point(self, call: Callable[[], T], *, writes: bool = False, refusal: Callable[[], Exception] = OSError) -> T:
        """Make a call where the world may come in between, if an actor makes it."""
        actor = self.actor()
        if actor is None:
            return call()
        if self.is_remote:
            if actor.is_dead:
                raise Killed
            return call()
        self.num_points += 1
        return actor.at_point(call, writes=writes, refusal=refusal)

    def time_ns(self) -> int:
        """Now, by the clock of whoever asks."""
        self.passed_ns += _TICK_NS
        actor = self.actor()
        return self.begun_ns + self.passed_ns + int((actor.skew_s if actor else 0.0) * 1e9)

    def true_s(self) -> float:
        """Now, in seconds since the epoch, by the clock of the store."""
        return (self.begun_ns + self.passed_ns) / 1e9

    def go_by(self, hours: float) -> None:
        """Let time go by for all."""
        self.passed_ns += int(hours * 3600 * 1e9)

    def new_uuid(self) -> uuid.UUID:
        """A UUID that follows from the seed."""
        return uuid.UUID(int=self.chance.getrandbits(128), version=4)

    def fails_one_in(self, number: int) -> bool:
        """Whether something fails that fails once in so many times."""
        return self.chance.random() < 1 / number and not self.is_at_peace

    def end(self) -> None:
        """Kill what is at work still."""
        for actor in self.actors:
            if actor.is_busy:
                actor.turn(0, "kill")
