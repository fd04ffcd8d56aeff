"""The clock of this machine, asked here by all that writes a time into a store, or decides by one what a store holds.

A clock informs and may be wrong. A simulated world puts its own in place of `time_ns`, which is why nobody who is at
work on a store asks another.
"""

import time
from datetime import UTC, datetime


def time_ns() -> int:
    """Now, in nanoseconds since the epoch."""
    return time.time_ns()


def now_s() -> float:
    """Now, in seconds since the epoch."""
    return time_ns() / 1e9


def now_us() -> int:
    """Now, in whole microseconds since the epoch: what a `seq` is made of."""
    return time_ns() // 1000


def now_ms() -> int:
    """Now, in whole milliseconds since the epoch, as Delta's log counts."""
    return time_ns() // 1_000_000


def utc_now() -> datetime:
    """Now, as the tables hold times: naive, in UTC."""
    return datetime.fromtimestamp(now_s(), UTC).replace(tzinfo=None)
