"""What is being taken out of a store: files, or writes, that no commit may name any more.

Who deletes files that no log names, or the rows of writes that are not live, cannot know whether their writer died or
only sleeps, and need not. It first notes what it takes, in `STORE/taken/TABLE/`, and then commits nothing to the table:
since commits are accepted only upon the newest version of a log (`Logs.upon_newest`), whoever commits afterwards has
seen the note, or finds that the files are gone. So it is the log that decides, and no clock.
"""

import json
import uuid
from collections.abc import Collection
from typing import Any

from longvlm.pipeline.store.files import filesystem
from longvlm.schemas import clock


def taken(store_uri: str, table: str) -> frozenset[str]:
    """What is being taken from a table now: names of files, of the ledger write ids."""
    names: set[str] = set()
    for note in _notes(store_uri, table):
        fs, path = filesystem(note)
        try:
            names |= {*json.loads(fs.cat_file(path))}
        except FileNotFoundError:
            continue  # done meanwhile
        except ValueError:  # cut off with its writer, who took nothing yet
            continue
    return frozenset(names)


def note(store_uri: str, table: str, names: Collection[str]) -> str:
    """Note what is to be taken from a table; returns where, for `strike`."""
    uri = f"{_folder(store_uri, table)}/{uuid.uuid4()}.json"
    fs, path = filesystem(uri)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, json.dumps(sorted(names)).encode())
    return uri


def strike(uri: str) -> None:
    """Remove a note: what it names is taken."""
    fs, path = filesystem(uri)
    fs.rm_file(path)


def strike_old(store_uri: str, table: str, hours: float) -> None:
    """Remove the notes of who was killed so many hours ago: what they took is gone, what they left is nobody's."""
    for uri in _notes(store_uri, table):
        fs, path = filesystem(uri)
        if fs.modified(path).timestamp() < clock.now_s() - hours * 3600:
            fs.rm_file(path)


def _folder(store_uri: str, table: str) -> str:
    return f"{store_uri}/taken/{table}"


def _notes(store_uri: str, table: str) -> list[str]:
    fs, path = filesystem(_folder(store_uri, table))
    fs.invalidate_cache()
    try:
        found: list[Any] = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    return [f"{_folder(store_uri, table)}/{name.rpartition('/')[2]}" for name in found if name.endswith(".json")]
