"""Whether a video is refused or the run: a bucket that refuses everything is no failure of its videos."""

import random
from collections.abc import Mapping

import pyarrow as pa

from longvlm.jobs.limits import TooManyFailuresError
from longvlm.pipeline.source.copies import is_readable
from longvlm.pipeline.uris import is_local
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode
from longvlm.schemas.rows import PlanRow

REFUSALS_IN_A_ROW = 3
_NUM_OTHERS = 8  # videos that are tried before all of a bucket is taken to be forbidden
_SAYS_NOTHING = {ErrorCode.NETWORK, ErrorCode.NO_SPACE, ErrorCode.TOO_LARGE, ErrorCode.LOST}  # of rights


class RefusedVideos:
    """Holds back the outcomes of videos that a bucket refused, until it is clear who is refused.

    If several in a row are refused, and others cannot be read either, it is the run: for its keys, its clock, or a
    policy. Then it ends, and nothing is noted of those videos.
    """

    def __init__(self) -> None:
        self._held: list[pa.Table] = []  # tables.OUTCOMES, a row each
        self._last_read: str | None = None  # uri

    def sift(self, outcomes: pa.Table, planned: Mapping[str, PlanRow]) -> pa.Table:
        """Hold back what a bucket refused since it last let one be read, and return the other outcomes.

        Args:
            outcomes: tables.OUTCOMES as they landed.
            planned: videos by write_id, also those held back.
        """
        standing = [tables.OUTCOMES.empty_table()]
        for i, row in enumerate(outcomes.select(["write_id", "error_code"]).to_pylist()):
            outcome, video = outcomes.slice(i, 1), planned.get(row["write_id"])
            if video is None or not _is_in_bucket(video["uri"]) or row["error_code"] in _SAYS_NOTHING:
                standing.append(outcome)
            elif row["error_code"] in (ErrorCode.CREDENTIALS, ErrorCode.FORBIDDEN):
                self._held.append(outcome)
            else:
                self._last_read = video["uri"]
                standing += [*self._release(), outcome]
        return pa.concat_tables(standing)

    def judge(self, planned: Mapping[str, PlanRow], *, is_end: bool = False) -> pa.Table:
        """The outcomes held back, as far as they turned out to be the videos' own; tables.OUTCOMES.

        Args:
            planned: videos by write_id, also those held back.
            is_end: nothing more will land.

        Raises:
            TooManyFailuresError: the run is refused.
        """
        codes = self._codes()
        if len(self._held) >= REFUSALS_IN_A_ROW:
            if ErrorCode.CREDENTIALS in codes or not self._can_read_others(planned):
                raise self._error()
        elif not is_end:
            return tables.OUTCOMES.empty_table()
        elif ErrorCode.CREDENTIALS in codes:
            raise self._error()
        return pa.concat_tables([tables.OUTCOMES.empty_table(), *self._release()])

    def _can_read_others(self, planned: Mapping[str, PlanRow]) -> bool:
        refused = {outcome["write_id"][0].as_py() for outcome in self._held}
        others = [video["uri"] for key, video in planned.items() if key not in refused]
        some = random.sample(others, min(_NUM_OTHERS, len(others)))
        return any(is_readable(uri) for uri in [self._last_read, *some] if uri is not None and _is_in_bucket(uri))

    def _codes(self) -> set[str]:
        return {outcome["error_code"][0].as_py() for outcome in self._held}

    def _release(self) -> list[pa.Table]:
        released, self._held = self._held, []
        return released

    def _error(self) -> TooManyFailuresError:
        number, last = len(self._held), self._held[-1]["error"][0].as_py().rstrip(".")
        who, them = ("a video was", "it") if number == 1 else (f"{number} videos in a row were", "them")
        return TooManyFailuresError(f"{who} refused, and nothing is noted of {them}: {last}")


def _is_in_bucket(uri: str) -> bool:
    return not is_local(uri) and not uri.startswith(("http://", "https://"))
