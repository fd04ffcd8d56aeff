"""Whether a job is at a standstill: its main thread waits, and has used no processor for as long as nothing may take.

Whatever it waits for, be it a disk that hangs or a server that never answers, there is no one place to see that from
but the thread itself. What its stages do on a cluster, which may hang too, `jobs/cluster/watch.py` looks at.
"""

import sys
import threading
import time

LIMIT_S = 3600.0  # longer than any one wait: half an hour for a stage, five minutes for a store out of reach
_LEAST_CPU_S = 0.01


class Standstill:
    """Looks at the main thread of this process each time that it is called, from another one."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._cpu_s, self._since_s = 0.0, time.monotonic()

    def __call__(self) -> str | None:
        """Since when nothing has moved, and where, in words; None while something does, or nobody can tell."""
        if not hasattr(time, "pthread_getcpuclockid"):  # not on every system
            return None
        main = threading.main_thread().ident or 0
        cpu_s = time.clock_gettime(time.pthread_getcpuclockid(main))
        if cpu_s - self._cpu_s >= _LEAST_CPU_S:
            self._cpu_s, self._since_s = cpu_s, time.monotonic()
        waited_s = time.monotonic() - self._since_s
        if waited_s < self._limit_s:
            return None
        frame = sys._current_frames()[main]  # noqa: SLF001 - documented, for looks from another thread
        place = f"{frame.f_code.co_name} of {frame.f_code.co_filename}"
        return f"nothing has moved for {waited_s / 60:.0f} minutes; it waits in {place}"
