"""The files of a Delta log themselves: whether they are whole, and how to do without those that are not.

`00000000000000000007.json` is the commit of version 7; `...24.checkpoint.parquet` says all that the commits up to 24
do; `_last_checkpoint` hints at the newest of these (Delta protocol, "Delta Log Entries", "Checkpoints").
"""

import io
import json
import logging
import re
from collections.abc import Callable, Collection
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longvlm.pipeline.store.files import filesystem
from longvlm.schemas import clock
from longvlm.schemas.errors import InputError

_COMMIT = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.parquet")
_HINT = "_last_checkpoint"
_ACTIONS = {  # Delta protocol, "Actions"; a commit that says anything else has rotted
    "add", "remove", "cdc", "metaData", "protocol", "txn", "commitInfo", "domainMetadata",
}  # fmt: skip

logger = logging.getLogger(__name__)


def log_damage(log_uri: str) -> dict[str, str]:
    """What is wrong with a table's log since its newest whole checkpoint: file -> reason, in words.

    A commit that is empty, as a power cut may leave one, is read by Delta as one that did nothing.
    """
    checkpoints, commits = _damage(log_uri)
    named = {_checkpoint(version): why for version, why in checkpoints.items()}
    named |= {_commit(version): why for version, why in commits.items()}
    return {f"{log_uri}/{name}": why for name, why in named.items()}


def refuse_damaged(log_uri: str) -> None:
    """Raise InputError where commits that a log needs are damaged or missing."""
    _, commits = _damage(log_uri)
    if commits:
        version, why = next(iter(commits.items()))
        more = f", and {len(commits) - 1} more are damaged" if len(commits) > 1 else ""
        raise InputError(
            f"the log {log_uri} is damaged: of {_commit(version)}, {why}{more}. Bring it back from a copy of the "
            f"bucket; or do without, by `longvlm maintain --store {log_uri.rsplit('/', 2)[0]} --repair`: then the next "
            "runs make again what it held."
        )


def replace_damaged_commits(log_uri: str, first_commit: Callable[[], bytes]) -> dict[str, str]:
    """Put commits that do nothing in the place of those that are damaged or missing: the log can be read without them.

    Files that they added are not part of the table any more, and files that they removed are again. What was damaged is
    kept under another name.

    Args:
        log_uri: of the log.
        first_commit: gives the content of one that makes the table.

    Returns:
        What was replaced, as `log_damage` has it.
    """
    _, commits = _damage(log_uri)
    fs, root = filesystem(log_uri)
    for version, why in commits.items():
        logger.warning("%s/%s is replaced by a commit that does nothing: %s", log_uri, _commit(version), why)
        path = f"{root}/{_commit(version)}"
        if fs.exists(path):
            fs.copy(path, f"{path}.damaged")
        nothing = {"commitInfo": {"timestamp": clock.now_ms(), "operation": "REPAIR", "operationParameters": {}}}
        fs.pipe_file(path, json.dumps(nothing).encode() + b"\n" if version else first_commit())
    return {f"{log_uri}/{_commit(version)}": why for version, why in commits.items()}


def drop_damaged_checkpoint(log_uri: str) -> bool:
    """Do without the newest checkpoint, if that is what keeps a log from being read; False if it is not.

    What is damaged is renamed, so that Delta does not find it, and the next checkpoint is made as always.

    Raises:
        InputError: the commits before it are gone.
        OSError: the log may not be written.
    """
    names = _names(log_uri)
    checkpoints = _versions(_CHECKPOINT, names)
    damaged = [version for version in checkpoints if _damage_of_checkpoint(log_uri, version)]
    is_hinted_at = _hinted_version(log_uri, names)
    if not damaged and (is_hinted_at is None or is_hinted_at in checkpoints):
        return False
    since = max((version for version in checkpoints if version not in damaged), default=-1)
    if _gaps(since, _versions(_COMMIT, names)):
        raise InputError(
            f"the newest checkpoint of {log_uri} is lost or damaged, and the commits before it are gone; bring it back "
            "from a copy of the bucket."
        )
    logger.warning("the newest checkpoint of %s is lost or damaged; it is read without it", log_uri)
    fs, root = filesystem(log_uri)
    for version in damaged:
        fs.mv(f"{root}/{_checkpoint(version)}", f"{root}/{_checkpoint(version)}.damaged")
    if _HINT in names:
        fs.rm_file(f"{root}/{_HINT}")
    return True


def _damage(log_uri: str) -> tuple[dict[int, str], dict[int, str]]:
    """The damaged checkpoints, and the damaged or missing commits since the newest whole one: version -> reason."""
    names = _names(log_uri)
    versions = _versions(_CHECKPOINT, names)
    checkpoints = {version: why for version in versions if (why := _damage_of_checkpoint(log_uri, version))}
    since = max(set(versions) - checkpoints.keys(), default=-1)
    there = [version for version in _versions(_COMMIT, names) if version > since]
    commits = {version: why for version in there if (why := _damage_of_commit(log_uri, version))}
    commits |= dict.fromkeys(_gaps(since, there), "it is missing, and so is what it added")
    return checkpoints, dict(sorted(commits.items()))


def _damage_of_checkpoint(log_uri: str, version: int) -> str | None:
    fs, root = filesystem(log_uri)
    try:
        content = fs.cat_file(f"{root}/{_checkpoint(version)}")  # what fails here is not the file's fault
    except FileNotFoundError:  # cleaned up meanwhile
        return None
    try:
        parquet = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
        parquet.read(use_threads=False).validate(full=True)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        return f"the checkpoint cannot be read ({str(error).splitlines()[0]})"
    return None


def _damage_of_commit(log_uri: str, version: int) -> str | None:
    fs, root = filesystem(log_uri)
    try:
        lines = fs.cat_file(f"{root}/{_commit(version)}").splitlines()
        actions = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:  # cleaned up meanwhile
        return None
    except ValueError:
        return "the commit is no JSON"
    if not actions:
        return "the commit is empty, and what it added is not part of the store"
    is_known = all(isinstance(action, dict) and action.keys() <= _ACTIONS for action in actions)
    return None if is_known else "the commit says what Delta does not know"


def _hinted_version(log_uri: str, names: Collection[str]) -> int | None:
    if _HINT not in names:
        return None
    fs, root = filesystem(log_uri)
    try:
        version: int = json.loads(fs.cat_file(f"{root}/{_HINT}"))["version"]
    except (ValueError, KeyError, TypeError):
        return None
    return version


def _names(log_uri: str) -> set[str]:
    """A log's files, listed twice: what is written during the listing of a folder is seen or not.

    So one listing may show a commit and not the one before it. The second has both.
    """
    return _listed(log_uri) | _listed(log_uri)


def _listed(log_uri: str) -> set[str]:
    fs, root = filesystem(log_uri)
    fs.invalidate_cache()
    found: list[Any] = fs.ls(root, detail=False)
    return {name.rpartition("/")[2] for name in found}


def _versions(kind: re.Pattern[str], names: Collection[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := kind.fullmatch(name)))


def _gaps(since: int, commits: Collection[int]) -> list[int]:
    """The versions without a commit between a checkpoint, or the beginning, and the newest."""
    later = {version for version in commits if version > since}
    return sorted(set(range(since + 1, max(later, default=since) + 1)) - later)


def _commit(version: int) -> str:
    return f"{version:020}.json"


def _checkpoint(version: int) -> str:
    return f"{version:020}.checkpoint.parquet"
