"""Questions asked in the pages: answered by a loaded model from stored tokens, one at a time, and kept if wanted."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from deltalake.exceptions import DeltaError

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.runs import record_run
from longvlm.jobs.serve.pinned import PinnedStore, Row, waiting
from longvlm.pipeline.answering.questions import CHOICE_SEPARATOR, ask
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id

if TYPE_CHECKING:
    from longvlm.jobs.answer.loaded import LoadedModel
    from longvlm.pipeline.store.query.search import Hit

KINDS = {"text": "in words", "bool": "yes or no", "choice": "one of some", "number": "a number"}
MAX_QUESTION = 2000  # characters, its choices included


@dataclass(frozen=True)
class QuestionForm:
    """A question as a page asks it; without words it is none."""

    question: str = ""
    kind: str = "text"
    choices: str = ""  # of a choice, with `|` between them

    def as_table(self) -> pa.Table:
        """One row of tables.QUESTIONS. Raises InputError where it cannot be asked."""
        if len(self.question) + len(self.choices) > MAX_QUESTION:
            raise InputError(f"that question is too long; ask it in {MAX_QUESTION:,} characters.")
        if self.kind not in KINDS:
            raise InputError(f"a question here is of the kinds {', '.join(KINDS)}.")
        choices = [choice.strip() for choice in self.choices.split(CHOICE_SEPARATOR) if choice.strip()]
        return ask(self.question, self.kind, choices if self.kind == "choice" else [])


@dataclass
class AskedNow:
    """What became of a question."""

    question_hash: str
    answers: list[Row] = field(default_factory=list)  # of tables.ANSWERS, old and new, in the order of the videos
    run_id: str = field(default_factory=new_run_id)
    wall_s: float = 0.0
    num_reused: int = 0  # answers that the store had
    num_left: int = 0  # videos whose turn did not come in time
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stopped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The counts of its row in `runs`."""
        new = Counter(row["status"] for row in self.answers if row["run_id"] == self.run_id)
        counts = {"videos": len(self.answers) + self.num_left, "asked": len(self.answers) + self.num_left}
        return {**counts, **new, "reused": self.num_reused, "not_attempted": self.num_left, "from": "serve"}


class Asker:
    """A loaded model that one page at a time may use.

    Args:
        store_uri: of the store.
        loaded: the model.
        keeps: answers to forms that are posted go into the store.
    """

    def __init__(self, store_uri: str, loaded: "LoadedModel", *, keeps: bool) -> None:
        self._store_uri, self._loaded, self.keeps = store_uri, loaded, keeps
        self._turn = threading.BoundedSemaphore(SERVE.asks_at_once)

    @property
    def model(self) -> str:
        """Its name."""
        return self._loaded.spec.name

    def ask(self, pinned: PinnedStore, videos: Sequence[Row], form: QuestionForm, *, keep: bool) -> AskedNow:
        """Answer a question to some videos; what the store has an answer to is not asked again.

        Args:
            pinned: the store as it is shown.
            videos: live ones: video_id, uri, write_id and recipe. Only the first `SERVE.ask_videos` are asked.
            form: the question.
            keep: write the answers that are new into the store.

        Raises:
            InputError: the question or the videos do not go with the model, or the store cannot be written.
            BusyError: others ask already.
        """
        started_s = time.monotonic()
        videos = videos[: SERVE.ask_videos]
        self._check(videos)
        asked = self._loaded.asked(form.as_table())
        now = AskedNow(asked["question_hash"])
        with self.turn():
            known = self._known(pinned, asked["question_hash"], videos)
            left = [video for video in videos if video["write_id"] not in known]
            end_s = started_s + SERVE.ask_s
            new = list(self._loaded.answers(pinned.snapshot, now.run_id, asked, left, end_s)) if left else []
        found = known | {row["write_id"]: row for row in new}
        now.answers = [found[video["write_id"]] for video in videos if video["write_id"] in found]
        now.num_reused, now.num_left = len(known), len(videos) - len(found)
        now.wall_s = time.monotonic() - started_s
        if keep and new:
            self._keep(new, now)
        return now

    @contextmanager
    def turn(self) -> Iterator["LoadedModel"]:
        """The model, for one at a time. Raises BusyError where others are long at it."""
        with waiting(self._turn):
            yield self._loaded

    def verify(self, pinned: PinnedStore, hits: "Sequence[Hit]", question: str) -> tuple[list[float | None], list[str]]:
        """The share of yes for each hit of a search, and what a person should know of it.

        Raises:
            InputError: the model reads other tokens than those that were searched.
            BusyError: others ask already.
        """
        from longvlm.jobs.query.verify import verify

        self._check([{"recipe": pinned.recipe}])
        with self.turn() as loaded:
            told = verify(loaded, pinned.snapshot, hits, question)
        return told.yes, [*told.problems, told.calibration]

    def _check(self, videos: Sequence[Row]) -> None:
        stored = self._loaded.stored
        if not videos:
            raise InputError("there is no indexed video among these; choose others.")
        if any(video["recipe"] != stored.fingerprint for video in videos):
            raise InputError(f"{self.model} reads the tokens of the recipe {stored.name}, and these are of another.")

    def _known(self, pinned: PinnedStore, question_hash: str, videos: Sequence[Row]) -> dict[str, Row]:
        """The answers that the store has, by write id."""
        rows = pinned.rows(
            "SELECT * FROM answers WHERE question_hash = $hash AND answer_recipe = $recipe "
            "AND status IN ('answered', 'unparsed') AND write_id IN (SELECT unnest($write_ids))",
            {
                "hash": question_hash,
                "recipe": self._loaded.recipe().fingerprint,
                "write_ids": [video["write_id"] for video in videos],
            },
        )
        return {row["write_id"]: row for row in rows}

    def _keep(self, new: list[Row], now: AskedNow) -> None:
        try:
            store = Store.open(self._store_uri)
            store.append("answers", pa.Table.from_pylist(new, tables.ANSWERS))
            record_run(store, "answer", now)
        except (DeltaError, OSError) as error:
            said = catalog.first_line(error)
            raise InputError(f"the answers cannot be written now ({said}); they are lost.") from error
