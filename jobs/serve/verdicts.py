"""A person's verdicts on answers: thumbs, kept in the table `verdicts` as another judge's are."""

import getpass
import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
from deltalake.exceptions import DeltaError

from longvlm.jobs.serve.pinned import PinnedStore, Row, waiting
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import clock, tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id

BENCHMARK, DIMENSION = "human", "qa"
_NAME = re.compile(r"[\w.@+-]{1,64}")
KEY = ("write_id", "question_id", "question_hash", "answer_recipe")  # of an answer
_SAID = """
SELECT write_id, question_id, question, answer_recipe, prediction, judge, is_right FROM verdicts
WHERE benchmark = $benchmark AND is_right IS NOT NULL AND write_id IN (SELECT unnest($write_ids))
ORDER BY judge
"""
_Key = tuple[Any, ...]


def name_of(asked: str) -> str:
    """The name under which a person judges: the one that was asked for, or the login's where that is empty.

    Raises:
        InputError: it is no name, or there is no login.
    """
    try:
        name = asked or getpass.getuser()
    except (OSError, KeyError) as error:
        raise InputError("who you are cannot be told from the login; say it: --write NAME.") from error
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot stand in a verdict; take up to 64 letters, digits and . @ + - _.")
    return name


class HumanVerdicts:
    """What a person says of answers: written at once, and shown before the store is looked at again.

    Args:
        store_uri: of the store.
        name: of the person.
    """

    def __init__(self, store_uri: str, name: str) -> None:
        self._store_uri, self.name = store_uri, name
        self._run_id = new_run_id()
        self._turn = threading.BoundedSemaphore(1)  # so that of two clicks the later one is newer
        self._said: dict[_Key, Row] = {}  # since the server began

    def add(self, pinned: PinnedStore, key: Mapping[str, str], *, is_right: bool) -> None:
        """Write a verdict on an answer that the store holds.

        Args:
            pinned: the store as it is shown.
            key: the values of KEY.
            is_right: the verdict.

        Raises:
            InputError: there is no such answer, or it says nothing that could be right; or the store cannot be written.
            BusyError: others are being written.
        """
        found = pinned.rows(
            "SELECT question_id, question, video_id, uri, write_id, answer_recipe, model, answer FROM answers "
            f"WHERE status <> 'failed' AND {' AND '.join(f'{name} = ${name}' for name in KEY)}",
            {name: key[name] for name in KEY},
            1,
        )
        if not found:
            raise InputError("there is no such answer any more; load the page again.")
        row = self._row(found[0], is_right=is_right)
        with waiting(self._turn):
            try:
                Store.open(self._store_uri).append("verdicts", pa.Table.from_pylist([row], tables.VERDICTS))
            except (DeltaError, OSError) as error:
                said = catalog.first_line(error)
                raise InputError(f"the store cannot be written now ({said}); nothing was noted.") from error
            self._said[_key(row)] = row

    def _row(self, answer: Row, *, is_right: bool) -> Row:
        prediction = answer.pop("answer")
        shown = f"{answer['question']}\x1f{prediction or ''}"  # and the video
        return {
            **dict.fromkeys(tables.VERDICTS.names),
            **answer,
            "run_id": self._run_id,
            "benchmark": BENCHMARK,
            "dimension": DIMENSION,
            "prediction": prediction,
            "judge": f"human:{self.name}",
            "prompt_hash": hashlib.sha256(shown.encode("utf-8", "replace")).hexdigest(),
            "is_right": is_right,
            "status": "judged",
            "created_at": clock.utc_now(),
        }

    def since_the_start(self) -> list[Row]:
        """The newest on each answer, of those that were written here."""
        return list(self._said.values())


def add_verdicts(pinned: PinnedStore, answers: Iterable[Row], written: HumanVerdicts | None) -> None:
    """Give answers what people say of them: `verdicts`, is_right by name.

    What was said of another answer to the question, before it was asked again, is left out.

    Args:
        pinned: the store as it is shown.
        answers: with the values of KEY, question and answer.
        written: what is newer than the store as it is shown.
    """
    by_key = {}
    for answer in answers:
        answer["verdicts"] = {}
        by_key[_key(answer)] = answer
    if not by_key:
        return
    values = {"benchmark": BENCHMARK, "write_ids": list({key[0] for key in by_key})}
    said = pinned.rows(_SAID, values) + (written.since_the_start() if written else [])
    for row in said:
        of = by_key.get(_key(row))
        if of is not None and of["answer"] == row["prediction"]:
            of["verdicts"][row["judge"].removeprefix("human:")] = row["is_right"]


def _key(row: Row) -> _Key:
    return tuple(row[name] for name in ("write_id", "question_id", "question", "answer_recipe"))
