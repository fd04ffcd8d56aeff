"""When a run ends before its work does: the hours it was given, and the share of failures it may have."""

import time
from collections import Counter
from dataclasses import dataclass

from longvlm.jobs.cluster.executor import OutOfTimeError
from longvlm.jobs.cluster.resources import MIN_OUTCOMES
from longvlm.schemas.errors import OWN_FAILURES

INTERRUPTED = "interrupted"  # why a job stopped that Ctrl-C or SIGTERM ended


class TooManyFailuresError(Exception):
    """So many videos of a run fail that something else than the videos is likely to be wrong."""


@dataclass(frozen=True)
class Limits:
    """When a run ends before its work does."""

    max_hours: float | None
    max_failed: float  # of the outcomes, as a fraction: those that may be an outage, and not the video's own fault
    started_s: float  # seconds since the epoch

    @property
    def ends_s(self) -> float | None:
        """When the time of the run is over, in seconds since the epoch; None: never."""
        return None if self.max_hours is None else self.started_s + self.max_hours * 3600

    def check(self, settled: Counter[str]) -> None:
        """Raise OutOfTimeError or TooManyFailuresError if it is time to end.

        Args:
            settled: this run's outcomes so far: how many were indexed, and failed by code.
        """
        outages = Counter({way: n for way, n in settled.items() if way != "indexed" and way not in OWN_FAILURES})
        if settled.total() >= MIN_OUTCOMES and outages.total() > self.max_failed * settled.total():
            codes = ", ".join(f"{code} {number}" for code, number in outages.most_common())
            raise TooManyFailuresError(
                f"{outages.total()} of {settled.total()} videos failed, more than --max-failed allows, and not by "
                f"themselves ({codes}); `longvlm sql` on the view failures says more"
            )
        if self.ends_s is not None and time.time() > self.ends_s:
            raise OutOfTimeError
