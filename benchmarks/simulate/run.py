"""A history played from its first turn to its last, and then to the peace in which everything has to be right."""

import logging
import shutil
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.simulate import people
from benchmarks.simulate.jobs import QUESTIONS, Jobs, stood_in
from benchmarks.simulate.model import Model
from benchmarks.simulate.people import Footage
from benchmarks.simulate.reader import PromiseError
from benchmarks.simulate.rot import rot
from benchmarks.simulate.seams import simulated
from benchmarks.simulate.served import served
from benchmarks.simulate.turns import Turn
from benchmarks.simulate.world import Actor, Simulation
from longvlm.schemas.identity import video_id

VIEWS_EVERY = 5  # turns


@dataclass
class Played:
    """What came of a history."""

    problem: str | None = None
    step: int | None = None  # at which it showed; None: in the peace after the last
    told: list[str] = field(default_factory=list)  # what happened, in words
    num_points: int = 0
    num_jobs: int = 0

    @property
    def kind(self) -> str | None:
        """The problem without what differs between two histories."""
        return None if self.problem is None else "".join(c for c in self.problem if not c.isdigit())[:40]


def play(turns: Sequence[Turn], seed: int, *, view_every: int = VIEWS_EVERY, in_bucket: bool = False) -> Played:
    """Play a history in a folder of its own; or with the store in a bucket, where each request is a point."""
    logging.disable(logging.CRITICAL)
    shm = Path("/dev/shm")  # noqa: S108 - memory, where it is there: a disk's fsync is not what is tried
    folder = Path(tempfile.mkdtemp(prefix="longvlm-simulate-", dir=shm if shm.is_dir() else None))
    played = Played()
    try:
        world = Simulation(folder, seed)
        with ExitStack() as stack:
            if in_bucket:
                world.store, world.is_remote = stack.enter_context(served(world)), True
            _History(world, played).play(turns, view_every)
    except PromiseError as error:
        played.problem = str(error)
        if error.__cause__ is not None:
            played.told += traceback.format_exception(error.__cause__)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        logging.disable(logging.NOTSET)
    return played


class _History:
    def __init__(self, world: Simulation, played: Played) -> None:
        (world.folder / "videos").mkdir()
        self.world = world
        self.bucket = Footage(world.folder / "videos")
        self.jobs = Jobs(self.world, self.bucket)
        self.model = Model(self.world, self.bucket)
        self.played = played
        self.about: dict[int, tuple[str, str, int]] = {}  # actor -> its job, the video that it is about, since when

    def play(self, turns: Sequence[Turn], view_every: int) -> None:
        with ExitStack() as stack:
            stack.enter_context(simulated(self.world))
            stack.enter_context(stood_in(self.world))
            stack.callback(self.world.end)
            for step, turn in enumerate(turns):
                self.played.step = step
                self.bucket.step = step
                if (done := self._take(turn)) is None:
                    continue
                self.played.told.append(f"{step:3} {turn}{done}")
                self._check(step, views=step % view_every == view_every - 1)
            self.played.step = None
            self._make_peace(len(turns))
            self.played.num_points = self.world.num_points

    def _take(self, turn: Turn) -> str | None:
        """One turn; what was done in words, None if nothing could be."""
        match turn.kind:
            case "job":
                return self._go_on(self.world.actors[turn.actor], turn)
            case "people":
                done = self.bucket.act(turn.what, turn.number)
                self.bucket.settle()
            case "clock":
                self.world.go_by(turn.amount)
                done = ""
            case "skew":
                self.world.actors[turn.actor].skew_s = turn.amount
                done = ""
            case "rot":
                done = rot(self.world, self.model.read, turn.what, turn.number)
        return done and f": {done}" if done != "" else ""

    def _go_on(self, actor: Actor, turn: Turn) -> str:
        if not actor.is_busy:
            self.about[actor.number] = turn.what, video_id(self.jobs.video(turn.number)), self.bucket.step
            actor.begin(turn.what, self.jobs.call(turn.what, turn.number))
            self.played.num_jobs += 1
        job = actor.job
        actor.turn(turn.points, turn.ending)
        if actor.is_busy:
            return f" ({job} waits)"
        return f" ({job}: {_said(actor)})"

    def _check(self, step: int, *, views: bool) -> None:
        """Hold all against the model; first what is there, since what jobs say is about that."""
        self.model.check(step)
        for number, (job, about, begun) in [*self.about.items()]:
            if not self.world.actors[number].is_busy:
                del self.about[number]
                self.model.judge(self.world.actors[number], job, about, begun)
        if views:
            self.model.check_views()

    # --- peace ---

    def _make_peace(self, step: int) -> None:
        """What sleeps wakes up or is dead; then what people would do: repair, index, answer, maintain."""
        for actor in self.world.actors:
            if actor.is_busy:
                actor.turn(None if actor.number % 2 else 0, "kill")
                self.played.told.append(f"    actor {actor.number} {_said(actor)}")
                self._check(step, views=False)
        actor = self.world.actors[0]
        actor.skew_s = 0.0
        self.world.go_by(24 * 9)
        self.world.is_at_peace = True
        for job in ["repair", "settle", "answer", "nightly", "maintain", "settle", "repair"]:
            step += 1
            self.bucket.step = step
            self._go_on(actor, Turn("job", job))
            self.played.told.append(f"    in peace: {job}: {_said(actor)}")
            error, last = actor.error, actor.returned
            self._check(step, views=True)
            if error is not None and self.bucket.there and "no indexed video" not in str(error):
                raise PromiseError(f"{job} in peace: {type(error).__name__}: {error}") from error
        self.model.check_bytes()
        self._check_peace(last)

    def _check_peace(self, last: Any) -> None:
        model, bucket = self.model, self.bucket
        if not bucket.there:
            return
        if last.stopped or last.verified.problems or last.verified.damaged_files:
            raise PromiseError(f"in peace the store is not well: {last.stopped} {last.verified}")
        rows = {video: row for (video, recipe), row in model.read.live().items() if recipe == model.promoted}
        live = {bucket.names()[video] for video in rows}
        listed = {bucket.names()[video] for video, row in rows.items() if row["source"] == str(bucket.folder)}
        kept_out = {bucket.names()[video] for video in model.read.kept_out()}
        wanted = {name for name, content in bucket.there.items() if not people.is_bad(content)}
        if extra := listed - bucket.there.keys():  # what a manifest named, its own prunings delete
            raise PromiseError(f"in peace {extra} are live, and not in the bucket")
        if missing := {name for name in wanted - live - kept_out if not self._is_forgotten_content(name)}:
            raise PromiseError(f"in peace {missing} are in the bucket, and not live")
        writes = {row["write_id"]: key for key, row in model.read.live().items() if key[1] == model.promoted}
        answered = {
            (row["write_id"], row["question"]) for row in model.read.rows("answers") if row["status"] == "answered"
        }
        if unanswered := {(write, text) for write in writes for text in QUESTIONS} - answered:
            raise PromiseError(f"in peace {len(unanswered)} questions are not answered")
        for video in model.read.kept_out():
            if left := model.read.holders(video):
                raise PromiseError(f"in peace {bucket.names()[video]} is forgotten, and in {left}")

    def _is_forgotten_content(self, name: str) -> bool:
        rows = self.model.read.rows("videos")
        size = len(people.written(self.bucket.there[name]))
        return any(row["error_code"] == "forgotten" and row["size_bytes"] == size for row in rows)


def _said(actor: Actor) -> str:
    if actor.error is not None:
        return f"{type(actor.error).__name__} {str(actor.error)[:150]}"
    stopped = getattr(actor.returned, "stopped", None)
    return f"stopped: {stopped}" if stopped else "done"
