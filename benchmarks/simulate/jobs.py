"""The jobs that actors run: the project's own, with stand-ins for watching a video and for a language model."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa

from benchmarks.simulate import people
from benchmarks.simulate.people import Footage
from benchmarks.simulate.world import Simulation
from longvlm.jobs import answer, index, runs
from longvlm.jobs.answer import stage
from longvlm.jobs.answer.terms import failed_answer
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.operate.forget import find_videos, run_forget
from longvlm.jobs.operate.maintain import MaintainOrder, run_maintain
from longvlm.jobs.operate.nightly import NightlyOrder, run_nightly
from longvlm.jobs.query.export import export_store
from longvlm.jobs.stored_videos import read_videos
from longvlm.pipeline.decode.units import failed_unit
from longvlm.pipeline.source.corpus import Source, spool_source
from longvlm.pipeline.store.catalog import connect
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.schemas import recipe, tables
from longvlm.schemas.errors import ErrorCode, InputError, PipelineError, TerminalError, TransientError
from longvlm.schemas.tower import TowerSpec

DIM = 16
TOWER = TowerSpec("stand-in", "feed", 4, (4, 4), DIM, 32, has_cls=True, search_dim=None)
RECIPES = {made.name: made for made in (recipe.long(TOWER), recipe.tiny(TOWER))}
QUESTIONS = ("What is it?", "Is it so?")
RETENTION_HOURS = 48.0
_FAILS_EVERY = 12  # of answers and of units, for reasons that pass


@contextmanager
def stood_in(world: Simulation) -> Iterator[None]:
    """Put stand-ins in the place of towers, decoders and language models, and leave `index.duckdb` alone."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, stand_in: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, stand_in))

        put(index.run, "spool_source", lambda *args: world.point(lambda: spool_source(*args)))
        put(index.run, "choose_index_recipe", _choose_recipe)
        put(index.run, "Watch", lambda *_: _Watch(world))
        put(index.run, "Encode", lambda *_: _encode)
        put(answer.run, "choose_answer_model", _choose_model)
        put(answer.run, "check_vocabulary", lambda *_: None)
        put(stage, "Answerer", lambda terms, *_: _Answerer(world, terms))
        put(runs, "refresh_index", lambda *_: None)  # a convenience, which takes longer than most jobs here
        yield


class Jobs:
    """What actors can be told to do.

    Args:
        world: that they are in.
        bucket: of the videos.
    """

    def __init__(self, world: Simulation, bucket: Footage) -> None:
        self.world, self.bucket, self.store = world, bucket, world.store
        self.questions = _file(world.folder / "questions.jsonl", [{"question": text} for text in QUESTIONS])
        self.alerts = world.folder / "alerts.sql"
        self.alerts.write_text("-- name: never\nSELECT 1 WHERE false;\n")

    def call(self, job: str, number: int) -> Callable[[], Any]:
        """A job, ready to begin; the number says which video it is about, where that is open."""
        known: dict[str, Callable[[], Any]] = {
            "index": lambda: index.run.run_index(self._order()),
            "prune": lambda: index.run.run_index(self._order(prune=True)),
            "settle": lambda: index.run.run_index(self._order(prune=True, restale=True)),
            "restale": lambda: index.run.run_index(self._order(recipe=[*RECIPES][number % 2], restale=True)),
            "manifest": lambda: index.run.run_index(self._manifest(number)),
            "answer": self._answer,
            "forget": lambda: run_forget(find_videos(self.store, [self.video(number)])),
            "maintain": lambda: run_maintain(MaintainOrder(self.store, RETENTION_HOURS)),
            "repair": lambda: run_maintain(MaintainOrder(self.store, RETENTION_HOURS, verify=True, repair=True)),
            "promote": lambda: Store.open(self.store).promote([*RECIPES][number % 2]),
            "export": lambda: export_store(self.store, str(self.world.folder / f"{number}.duckdb")),
            "nightly": self._nightly,
            "read": self._read,
        }
        return known[job]

    def _order(self, **settings: Any) -> IndexOrder:
        settings = {"retry_failed": (ErrorCode.NETWORK, ErrorCode.NOT_FOUND), "max_failed": 1.0, **settings}
        mass = settings.get("prune", False)
        source = Source(str(self.bucket.folder))
        order = IndexOrder(source, self.store, ray_address=IN_PROCESS, allow_mass_delete=mass)
        return replace(order, **settings)

    def _manifest(self, number: int) -> IndexOrder:
        """A list of some of the videos, which says nothing of the others."""
        names = [name for place, name in enumerate(sorted(self.bucket.there)) if number >> place & 1]
        path = self.world.folder / "listed.csv"
        path.write_text("uri\n" + "".join(f"{self.bucket.path(name)}\n" for name in names))
        return self._order(source=Source(str(path)), prune=True)

    def _answer(self) -> Any:
        texts = [{"question": text, "type": "text"} for text in QUESTIONS]
        asked = pa.Table.from_pylist(texts, tables.QUESTIONS)
        return answer.run.run_answer(answer.run.AnswerOrder(self.store, asked, ray_address=IN_PROCESS))

    def _nightly(self) -> Any:
        order = NightlyOrder(
            self._order(prune=True), str(self.questions), alerts=str(self.alerts), retention_hours=RETENTION_HOURS
        )
        return run_nightly(order)

    def video(self, number: int) -> str:
        """The address of a video that was in the bucket once."""
        known = sorted({*self.bucket.there, *self.bucket.trash}) or ["clip-00.mp4"]
        return self.bucket.path(known[number % len(known)])

    def _read(self) -> list[tuple[str, bytes | PipelineError]]:
        """Pin, think for a while, and read every token of what was live then: write id, and what it was."""
        store = Store.open(self.store)
        snapshot = store.pin()
        with connect(snapshot, ("live_videos",)) as con:
            live = con.execute("SELECT write_id FROM live_videos ORDER BY write_id").fetchall()
        found: list[tuple[str, bytes | PipelineError]] = []
        for (write_id,) in live:
            self.world.point(lambda: None)
            try:
                found += [(write_id, bytes(row)) for row in read_tokens(snapshot, [write_id])["local"].to_pylist()]
            except PipelineError as error:
                found.append((write_id, error))
        return found


class _Watch:
    """In place of decoding: a file's content is the number in it."""

    def __init__(self, world: Simulation) -> None:
        self.world = world

    def __call__(self, plan: pa.Table) -> Iterator[pa.Table]:
        """PLAN rows in, FRAMES rows out."""
        for video in plan.to_pylist():
            yield from self.world.point(lambda video=video: [*self._units(video)])  # type: ignore[misc]

    def _units(self, video: dict[str, Any]) -> Iterator[pa.Table]:
        try:
            if self.world.fails_one_in(_FAILS_EVERY):
                raise TransientError(ErrorCode.NETWORK, "the line is down.")
            try:
                size = Path(video["uri"]).stat().st_size
            except FileNotFoundError as error:
                raise TerminalError(ErrorCode.NOT_FOUND, "it is gone.") from error
            content = people.content_of_size(size)
            if size != video["size_bytes"]:
                raise TransientError(ErrorCode.NETWORK, "it changed since it was listed.")
            if people.is_bad(content):
                raise TerminalError(ErrorCode.TRUNCATED, "the file ends early.")
        except PipelineError as error:
            yield failed_unit(video, error)
            return
        each = people.num_segments(content) // people.num_units(content)
        for unit in range(people.num_units(content)):
            segments = [{"segment": n, "start_s": n * 10.0, "end_s": n * 10.0 + 10, "frames": [n]}
                        for n in range(unit * each, (unit + 1) * each)]  # fmt: skip
            row = {
                "video_id": video["video_id"], "write_id": video["write_id"], "unit": unit,
                "num_units": people.num_units(content), "duration_s": 10.0 * people.num_segments(content), "fps": 1.0,
                "width": 64, "height": 48, "num_frames": 40, "codec": str(content), "decoder": "stand-in",
                "num_segments": people.num_segments(content), "decode_ms": 1.0, "segments": segments,
            }  # fmt: skip
            yield pa.Table.from_pylist([row], tables.FRAMES)


def _encode(frames: pa.Table) -> pa.Table:
    """In place of encoding: each token of a content is its marker."""
    rows = []
    for unit in frames.to_pylist():
        row = {name: unit[name] for name in tables.ENCODED.names if name in unit} | {"encode_ms": 1.0}
        row["segments"] = [_segment(one, int(unit["codec"])) for one in unit["segments"] or []]
        rows.append(row)
    return pa.Table.from_pylist(rows, tables.ENCODED)


def _segment(one: dict[str, Any], content: int) -> dict[str, Any]:
    return {
        "segment": one["segment"], "start_s": one["start_s"], "end_s": one["end_s"], "first_frame": one["segment"],
        "last_frame": one["segment"], "num_frames": 1, "num_tokens": 1, "dim": DIM, "dtype": "float16",
        "local": people.marker(content), "sizes": b"\1\0", "spans": bytes(8), "cls": None,
    }  # fmt: skip


class _Answerer:
    """In place of a language model: the answer is what the stored tokens say of the content."""

    def __init__(self, world: Simulation, terms: Any) -> None:
        self.world, self.terms = world, terms

    def __call__(self, groups: pa.Table) -> Iterator[pa.Table]:
        """GROUPS in, ANSWERS out."""
        for group in groups.to_pylist():
            (video,) = self.world.point(lambda group=group: read_videos(self.terms.snapshot, [group["write_id"]]))  # type: ignore[misc]
            rows = [self._row(group, question, video) for question in group["questions"]]
            yield pa.Table.from_pylist(rows, tables.ANSWERS)

    def _row(self, group: Any, question: Any, video: Any) -> dict[str, Any]:
        error = TransientError(ErrorCode.ANSWER_FAILED, "it was not in the mood.")
        if isinstance(video, PipelineError):
            error = video  # type: ignore[assignment]
        row = failed_answer(group, question, self.terms.recipe, self.terms.run_id, error)
        if isinstance(video, PipelineError) or self.world.fails_one_in(_FAILS_EVERY):
            return row
        text = video.tokens.local[0].numpy().tobytes().decode(errors="replace")
        return row | {"status": "answered", "answer": text, "error": None, "error_code": None}


def _choose_recipe(store: Store | None, _: str | None, named: str | None, __: Any) -> tuple[Any, str]:
    active = store.active_recipe() if store else None
    if named is None and active is not None:
        return active.recipe, active.model
    return RECIPES[named or "long"], "stand-in"


def _choose_model(store: Store, _: str | None) -> tuple[Any, Any]:
    active = store.active_recipe()
    if active is None:
        raise InputError("the store holds no videos yet.")
    sight = SimpleNamespace(num_global_tokens=0)
    spec = SimpleNamespace(
        name="stand-in", weights="feed", context=4096, templates=("plain",), sight=sight, asked_decoding={}
    )
    return spec, active


def _file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
