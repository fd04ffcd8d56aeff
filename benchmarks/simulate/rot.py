"""Rot: files of a store that are not what was written any more, or not there."""

import os
from pathlib import Path

from benchmarks.simulate.reader import TABLES, StoreRead
from benchmarks.simulate.world import Simulation


def rot(world: Simulation, read: StoreRead, what: str, number: int) -> str | None:
    """Let a file of a kind rot; None where there is none.

    What holds rows of videos is noted in `world.hurt`: checkpoints, leases and notes may rot without any loss.
    """
    store = Path(world.store)
    match what:
        case "tokens" | "segments":
            table = read.tables[what]
            files = [table.folder / name for name in sorted(table.added_in)]
        case "checkpoint":
            logs = [store / name / "_delta_log" for name in TABLES]
            files = [
                path
                for log in logs
                for path in [*sorted(log.glob("*.checkpoint.parquet"))[-1:], log / "_last_checkpoint"]
            ]
        case "lease":
            files = sorted(store.glob("leases/*/*.json"))[-1:]
        case _:
            files = sorted(store.glob("taken/*/*.json"))
    files = [path for path in files if path.exists()]
    if not files:
        return None
    file = files[number % len(files)]
    how = ["a bit flips in", "the end is lost of", "nothing is there any more of"][number // 64 % 3]
    size = max(1, file.stat().st_size)
    if what in ("lease", "note"):  # its writer was killed at it
        how = "the end is lost of"
    if what in ("tokens", "segments"):
        world.hurt.add(str(file))
    kept = file.stat()
    match how:
        case "a bit flips in":
            content = bytearray(file.read_bytes())
            content[number // 192 % size] ^= 1 << number % 8
            file.write_bytes(content)
        case "the end is lost of":
            os.truncate(file, number // 192 % size)
        case _:
            file.unlink()
            return f"{how} {file.relative_to(store)}"
    os.utime(file, (kept.st_atime, kept.st_mtime))
    return f"{how} {file.relative_to(store)}"
