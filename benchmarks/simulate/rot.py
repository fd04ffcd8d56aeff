"""Rot: files of a store that are not what was written any more, or not there."""

import os
from typing import Any

from benchmarks.simulate.reader import TABLES, StoreRead
from benchmarks.simulate.world import Simulation


def rot(world: Simulation, read: StoreRead, what: str, number: int) -> str | None:
    """Let a file of a kind rot; None where there is none.

    What holds rows of videos is noted in `world.hurt`: checkpoints, leases and notes may rot without any loss.
    """
    fs, root = read.fs, read.root
    fs.invalidate_cache()
    match what:
        case "tokens" | "segments":
            table = read.tables[what]
            files = [f"{table.folder}/{name}" for name in sorted(table.added_in)]
        case "checkpoint":
            logs = [f"{root}/{name}/_delta_log" for name in TABLES]
            newest = [path for log in logs for path in sorted(fs.glob(f"{log}/*.checkpoint.parquet"))[-1:]]
            files = [*newest, *(f"{log}/_last_checkpoint" for log in logs)]
        case "lease":
            files = sorted(fs.glob(f"{root}/leases/*/*.json"))[-1:]
        case _:
            files = sorted(fs.glob(f"{root}/taken/*/*.json"))
    files = [path for path in files if fs.exists(path)]
    if not files:
        return None
    file = files[number % len(files)]
    hows = ["a bit flips in", "the end is lost of", "nothing is there any more of"]
    how = hows[1] if what in ("lease", "note") else hows[number // 64 % 3]  # their writer was killed at them
    if what in ("tokens", "segments"):
        world.hurt.add(file)
    _hurt(world, fs, file, hows.index(how), number)
    return f"{how} {file.removeprefix(root)}"


def _hurt(world: Simulation, fs: Any, file: str, how: int, number: int) -> None:
    content = bytearray(fs.cat_file(file))
    size = max(1, len(content))
    if how == 2:
        fs.rm_file(file)
        return
    if how == 1:
        content = content[: number // 192 % size]
    elif content:
        content[number // 192 % size] ^= 1 << number % 8
    changed_s = fs.modified(file).timestamp()
    fs.pipe_file(file, bytes(content))
    if not world.is_remote:
        os.utime(file, (changed_s, changed_s))
