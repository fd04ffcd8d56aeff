"""Rot: a bit of a stored file turns over. It is told by the file's name, and what it held is watched again."""

from pathlib import Path

from pyarrow import parquet

from benchmarks.faults.trial import Trial
from benchmarks.faults.world import Ended
from longvlm.pipeline.store.ledger import Store

_TAIL = 8  # a footer's length and the magic behind it
_TRACEBACK = "Traceback (most recent call last)"


def pick(trial: Trial, table: str) -> Path:
    """A file of a table that its log names."""
    return Path(trial.world.rng.choice(Store.open(trial.store).pin((table,)).table(table).files).uri)


def flip(path: Path, place: int) -> None:
    """Turn one bit of a file over."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def footer_start(path: Path) -> int:
    """Where the footer of a parquet file begins."""
    content = path.read_bytes()
    return len(content) - _TAIL - int.from_bytes(content[-_TAIL:][:4], "little")


def shard_damaged(trial: Trial) -> list[Ended]:
    """A bit of a stored token turns over; `maintain --verify` names the videos of that page and no others."""
    ended = trial.index().end()
    shard = pick(trial, "tokens")
    footer = parquet.ParquetFile(shard).metadata
    group = footer.row_group(trial.world.rng.randrange(footer.num_row_groups))
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "local")
    place = column.data_page_offset + column.total_compressed_size // 2
    flip(shard, place)
    verified = trial.start("maintain", "--verify", "--json").end()
    flip(shard, place)
    is_found = verified.code == 1 and len(verified.lines) > 1
    trial.expect(holds=is_found, otherwise=f"verify: exit {verified.code}, {verified.lines}, {verified.said[-300:]}")
    trial.notes.append(f"{len(verified.lines) - 1} lines of findings")
    clean = trial.start("maintain", "--verify", "--json").end()
    trial.expect(holds=clean.code == 0, otherwise=f"verify finds damage where there is none: {clean.lines}")
    return [ended]


def footer_rot(trial: Trial, table: str) -> list[Ended]:
    """A bit turns over at the beginning of a footer, where it makes the footer another one.

    `sql`, `status` and `maintain --verify` name the file, and none ends in a traceback. `maintain --repair` drops it,
    and the next run watches again what it held.
    """
    ended = trial.index().end()
    path = pick(trial, table)
    flip(path, footer_start(path))
    commands = (("sql", "SELECT count(*) AS n FROM tokens", "--json"), ("status", "--json"))
    for command, code in (*((command, 0) for command in commands), (("maintain", "--verify", "--json"), 1)):
        _check_told(trial, path, trial.start(*command).end(), command[0], code)
    repaired = trial.start("maintain", "--repair", "--json").end()
    _check_told(trial, path, repaired, "repair", 0)
    trial.notes.append(f"{(repaired.counts or {}).get('repaired')} videos to be indexed again")
    trial.go_on([] if table == "videos" else [ended])  # the ledger's rows of that run are lost with its file
    return []


def _check_told(trial: Trial, path: Path, ended: Ended, command: str, code: int) -> None:
    """Expect that a command told of a damaged file, in words, and ended with a code."""
    told = f"{ended.lines} {ended.said}"
    is_right = ended.code == code and path.name in told and _TRACEBACK not in told
    trial.expect(holds=is_right, otherwise=f"{command}: exit {ended.code}, {ended.lines}, {ended.said[-300:]}")
