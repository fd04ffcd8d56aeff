"""What a reader of a store must see after each turn, whatever came in between."""

import re
from collections import Counter, defaultdict
from typing import Any

import duckdb
from deltalake.exceptions import CommitFailedError, DeltaError

from benchmarks.simulate import people
from benchmarks.simulate.people import Footage
from benchmarks.simulate.reader import PromiseError, Row, StoreRead
from benchmarks.simulate.world import Actor, Killed, Simulation
from longvlm.pipeline.store.lease import LeaseHeldError
from longvlm.schemas.errors import ErrorCode, InputError, PipelineError

_REFUSALS = (InputError, LeaseHeldError, CommitFailedError)  # said in a sentence; nothing is lost
_INDEXING = ("index", "prune", "manifest", "restale", "settle")
_TROUBLE = (*_REFUSALS, DeltaError, OSError, duckdb.Error)  # where the world refused something, or something rots


class Model:
    """The promises of a store, held against what is there.

    Args:
        world: that the store is in.
        bucket: of its videos.
    """

    def __init__(self, world: Simulation, bucket: Footage) -> None:
        self.world, self.bucket = world, bucket
        self.read = StoreRead(world.store)
        self.step = 0
        self.first_seen: dict[tuple[Any, ...], int] = {}  # rows of videos -> step
        self.held: dict[tuple[str, str], int] = {}  # video and recipe -> content that has to stay live
        self.forgotten: dict[str, int] = {}  # videos that have to stay away -> step
        self.contents_forgotten: dict[int, int] = {}
        self.erased: set[str] = set()  # videos of which no log may name a row again, until their names are free
        self.deleted: dict[str, int] = {}  # videos that were plainly deleted last, which lifts a tombstone -> step
        self.hurt_writes: set[str] = set()
        self.answers: dict[tuple[str, str], str] = {}  # write and question -> run that gave the newest answer
        self.rows_of_run: dict[str, list[Row]] = defaultdict(list)
        self.known_writes: set[str] = set()
        self.promoted: str | None = None

    # --- after each turn ---

    def check(self, step: int) -> None:
        """Hold the store against its promises. Raises PromiseError."""
        self.step = step
        for path in self.world.hurt:
            self._note_hurt(path)
        new = self.read.refresh(self.world.hurt)
        self.world.hurt = {path for path in self.world.hurt if self._is_there(path)}
        self._take_in(new)
        live = self.read.live()
        self._check_whole(self.read, live)
        self._check_names(live)
        self._check_forgotten(live)
        self._check_held(live)
        self._hold(live)

    def check_bytes(self) -> None:
        """Hold what is live now against the bytes on the disk, whatever was hurt before. Raises PromiseError."""
        self.hurt_writes.clear()
        now = StoreRead(self.world.store)
        now.refresh(())
        self._check_whole(now, now.live())

    def check_views(self) -> None:
        """Hold what DuckDB shows against what the reader found. Raises PromiseError."""
        from longvlm.pipeline.store.catalog import connect
        from longvlm.pipeline.store.ledger import Store

        store = Store.find(self.world.store)
        if store is None or any(map(self._is_named, self.world.hurt)):
            return
        pinned = store.pin(("videos", "answers", "recipes"))
        with connect(pinned, ("live_videos", "answers", "active_recipe")) as con:  # all take a tenth of a second
            shown = set(con.execute("SELECT video_id, recipe, write_id FROM live_videos").fetchall())
            answers = con.execute("SELECT write_id, question, run_id FROM answers").fetchall()
            active = con.execute("FROM active_recipe").fetchall()
        live = self.read.live()
        if shown != (expected := {(*key, row["write_id"]) for key, row in live.items()}):
            raise PromiseError(f"live_videos shows {shown - expected} too much and {expected - shown} too little")
        writes = {row["write_id"] for row in live.values()}
        newest = {key: run for key, run in self.answers.items() if key[0] in writes}
        given = {(write, question): run for write, question, run in answers}
        for key in newest.keys() | given.keys():
            if newest.get(key) != given.get(key):
                raise PromiseError(
                    f"the answer to {key} is that of {given.get(key)}; newest is that of {newest.get(key)}"
                )
        if active != ([(self.promoted,)] if self.promoted else []):
            raise PromiseError(f"active is {active}, promoted last was {self.promoted}")

    # --- what jobs report ---

    def judge(self, actor: Actor, job: str, about: str, begun: int) -> None:
        """Hold what a job, begun at a step, said when it ended against what is there. Raises PromiseError."""
        error = actor.error
        if isinstance(error, Killed):
            return
        is_calm = not actor.was_disturbed and not actor.was_overtaken and not self.world.hurt
        if error is not None:
            if not isinstance(error, _REFUSALS if is_calm else _TROUBLE):
                raise PromiseError(f"{job} ended in {type(error).__name__}: {error}") from error
            return
        stopped = getattr(actor.returned, "stopped", None)
        if is_calm and stopped and job in (*_INDEXING, "answer", "nightly") and not _is_about_input(job, stopped):
            raise PromiseError(f"{job} stopped without a reason: {stopped}")
        if job in _INDEXING:
            self._judge_index(actor.returned)
        elif job == "forget" and not actor.returned.stopped:
            self._judge_forget(about, begun)
        elif job == "read":
            self._judge_read(actor.returned)

    def _judge_index(self, report: Any) -> None:
        rows = self.rows_of_run[report.run_id]
        new = [row for row in rows if row["status"] == "indexed" and row["indexed_at"] and not row["is_moved"]]
        failed = [row for row in rows if row["status"] == "failed"]
        said = report.counts.indexed, report.counts.failed
        if (len(new), len(failed)) != said:
            raise PromiseError(
                f"index says {said} videos were indexed and failed; its rows say {len(new), len(failed)}"
            )
        if again := [video for video, n in Counter(row["video_id"] for row in new + failed).items() if n > 1]:
            raise PromiseError(f"one run wrote several rows about {again}")

    def _judge_forget(self, video: str, begun: int) -> None:
        if video not in self.read.kept_out():
            if self.deleted.get(video, -1) >= begun:
                return  # somebody else erased it too, its file was gone, and what has its name now is another video
            raise PromiseError(f"forget says that {self._name(video)} is forgotten, and nothing keeps it out")
        if left := self.read.holders(video):
            raise PromiseError(f"forget says that nothing is left of {self._name(video)}, which is in {left}")
        self.erased.add(video)

    def _judge_read(self, found: list[tuple[str, bytes | PipelineError]]) -> None:
        for write, said in found:
            if write in self.hurt_writes or (isinstance(said, PipelineError) and said.code == ErrorCode.NOT_FOUND):
                continue  # what was pinned may be gone after the retention, or because it is to be forgotten
            if isinstance(said, PipelineError):
                raise PromiseError(f"a reader could not read {write}: {said}")
            contents = {row["size_bytes"] for row in self.read.rows("videos") if row["write_id"] == write}
            if contents and said not in {people.marker(people.content_of_size(size)) for size in contents}:
                raise PromiseError(f"a reader read {said!r} of {write}, which is another content")

    # --- what has to hold ---

    def _take_in(self, new: dict[str, list[Row]]) -> None:
        for table in ("videos", "answers"):
            known = [row["seq"] for row in self.read.rows(table) if _identity(row) in self.first_seen]
            newest_seq = max(known, default=0)  # of what is there still: what was newer may be erased
            for row in sorted(new[table], key=lambda row: row["seq"]):
                key = _identity(row)
                if key in self.first_seen:
                    continue
                self.first_seen[key] = self.step
                if row["seq"] <= newest_seq:
                    raise PromiseError(
                        f"a row of {table} was committed with seq {row['seq']}, and there was {newest_seq}"
                    )
                if table == "videos":
                    self._take_in_video(row)
                else:
                    self.answers[row["write_id"], row["question"]] = row["run_id"]
        for row in sorted(new["recipes"], key=lambda row: row["seq"]):
            if row["event"] == "promoted":
                self.promoted = row["recipe"]

    def _take_in_video(self, row: Row) -> None:
        self.rows_of_run[row["run_id"]].append(row | {"is_moved": row["write_id"] in self.known_writes})
        self.known_writes.add(row["write_id"])
        if row["status"] != "deleted":
            return
        video = row["video_id"]
        if row["error_code"] == "forgotten":
            self.forgotten[video] = self.step
            if row["size_bytes"]:
                self.contents_forgotten.setdefault(people.content_of_size(row["size_bytes"]), self.step)
            self._let_go(video)
            return
        self.erased.discard(video)
        self.deleted[video] = self.step
        if str(row["source"]).endswith(".csv"):  # a manifest's owner may leave out what is there
            self._let_go(video)

    def _check_whole(self, read: StoreRead, live: dict[tuple[str, str], Row]) -> None:
        segments: dict[str, list[int]] = defaultdict(list)
        tokens: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
        for row in read.rows("segments"):
            segments[row["write_id"]].append(row["segment"])
        for row in read.rows("tokens"):
            tokens[row["write_id"]].append((row["segment"], row["local"]))
        for (video, _), row in live.items():
            write, wanted = row["write_id"], [*range(row["num_segments"])]
            if write in self.hurt_writes:
                continue
            found = sorted(segments[write]), sorted(number for number, _ in tokens[write])
            if found != (wanted, wanted):
                raise PromiseError(
                    f"{self._name(video)} is live with segments {found[0]} and tokens {found[1]} of {wanted}"
                )
            right = people.marker(people.content_of_size(row["size_bytes"]))
            if wrong := [blob for _, blob in tokens[write] if blob != right]:
                raise PromiseError(f"{self._name(video)} is live with the tokens {wrong[0]!r} of another content")

    def _check_names(self, live: dict[tuple[str, str], Row]) -> None:
        names = Counter(row["write_id"] for row in live.values())
        if twice := [write for write, number in names.items() if number > 1]:
            raise PromiseError(f"{twice} are live under several names")

    def _check_forgotten(self, live: dict[tuple[str, str], Row]) -> None:
        there = {video for video, name in self.bucket.names().items() if name in self.bucket.there}
        self.forgotten = {video: step for video, step in self.forgotten.items() if video in there}
        kept = self.bucket.content_since.keys() & self.contents_forgotten.keys()
        self.contents_forgotten = {content: self.contents_forgotten[content] for content in kept}
        for table in ("videos", "tokens", "segments", "answers"):
            for row in self.read.rows(table):
                if row["video_id"] in self.erased and row.get("error_code") != "forgotten":
                    raise PromiseError(f"{table} names a row of {self._name(row['video_id'])} again, which was erased")
        for (video, _), row in live.items():
            if video in self.forgotten:
                raise PromiseError(f"{self._name(video)} was forgotten and is live")
            since = self.contents_forgotten.get(people.content_of_size(row["size_bytes"]), self.step + 1)
            if self.first_seen[_identity(row)] > since:
                raise PromiseError(f"{self._name(video)} was forgotten under another name, and is live")

    def _check_held(self, live: dict[tuple[str, str], Row]) -> None:
        for (video, recipe), content in [*self.held.items()]:
            name = self.bucket.names()[video]
            if self.bucket.there.get(name) != content or self.bucket.since[name] == self.step:
                self._let_go(video)
            elif (row := live.get((video, recipe))) is None:
                raise PromiseError(f"{name} was live, is in the bucket as it was, and is live no more")
            elif people.content_of_size(row["size_bytes"]) != content:
                raise PromiseError(f"{name} was live as it is in the bucket, and now an older content is")

    def _hold(self, live: dict[tuple[str, str], Row]) -> None:
        names = self.bucket.names()
        hurt = {video for (video, _), row in live.items() if row["write_id"] in self.hurt_writes}  # under any recipe
        for video in hurt:  # also one that rotted before its video was live by it, in place of a whole one
            self._let_go(video)
        for (video, recipe), row in live.items():
            name, content = names[video], people.content_of_size(row["size_bytes"])
            is_as_live = self.bucket.there.get(name) == content and video not in hurt
            if is_as_live and self.first_seen[_identity(row)] > self.bucket.since[name]:
                self.held[video, recipe] = content

    # --- helpers ---

    def _note_hurt(self, path: str) -> None:
        """What is hurt holds for its videos no more, until they are indexed again."""
        table, name = path.split("/")[-2:]
        for write in {row["write_id"] for row in self.read.tables[table].rows.get(name, [])} - self.hurt_writes:
            self.hurt_writes.add(write)
            for row in self.read.rows("videos"):
                if row["write_id"] == write:
                    self._let_go(row["video_id"])

    def _is_there(self, path: str) -> bool:
        table, name = path.split("/")[-2:]
        return self._is_named(path) or name in self.read.tables[table].on_disk()

    def _is_named(self, path: str) -> bool:
        table, name = path.split("/")[-2:]
        return name in self.read.tables[table].added_in

    def _let_go(self, video: str) -> None:
        self.held = {key: content for key, content in self.held.items() if key[0] != video}

    def _name(self, video: str) -> str:
        return self.bucket.names().get(video, video)


def _is_about_input(job: str, stopped: str) -> bool:
    """Whether a night's part says in a sentence of its own why there was nothing to do."""
    return job == "nightly" and not re.search(r"\w(Error|Exception): ", stopped)


def _identity(row: Row) -> tuple[Any, ...]:
    """What tells a row from all others."""
    names = ("run_id", "video_id", "recipe", "status", "error", "write_id", "seq", "question", "answer_recipe")
    return tuple(row.get(name) for name in names)
