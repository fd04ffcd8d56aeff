"""The local copy from which a video is decoded: the file in place, a sparse copy of what is shown, or all of it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.sampling import plan_units
from longvlm.pipeline.source.copies import check_unchanged, download, local_copy, persist
from longvlm.pipeline.source.fetch import WholeNeededError
from longvlm.pipeline.source.ranges import RemoteObject
from longvlm.pipeline.source.scratch import has_room
from longvlm.pipeline.source.sparse import SparseCopy, may_be_sparse
from longvlm.pipeline.uris import is_local
from longvlm.schemas.errors import PipelineError, TerminalError
from longvlm.schemas.recipe import IndexRecipe

_MAX_ROUNDS = 6  # of ranges: of a Matroska it takes two or three to know where its keyframes end
_USUAL_GROUP_S = 10.0  # groups of pictures are no longer, but for rare files


@dataclass
class VideoCopy:
    """A local copy of a video, or why there is none.

    What came from the network is told once, by whoever yields the first row after it: see `told`.
    """

    video: dict[str, Any]  # a row of tables.PLAN
    path: str = ""
    is_sparse: bool = False
    error: PipelineError | None = None  # fetching failed; it waits here for the row that tells it
    whole_because: str | None = None  # why a large remote file had to be fetched whole
    _num_bytes: int = 0

    @property
    def is_part(self) -> bool:
        """Whether other decoders have copies of the same video, and decode other units of it."""
        return self.video.get("first_unit") is not None

    def wanted(self, units: Sequence[Any]) -> range:
        """Which of a video's units are to be decoded from this copy."""
        end = self.video.get("end_unit")
        return range(self.video.get("first_unit") or 0, len(units) if end is None else min(end, len(units)))

    def check_unchanged(self) -> None:
        """Check that what others decode is the same file. Raises as `copies.check_unchanged`."""
        if self.is_part:
            check_unchanged(self.video)

    def complete(self, why: str) -> None:
        """Fetch the whole file in place of a sparse copy that did not do. Raises as `copies.local_copy`."""
        self.is_sparse, self.whole_because = False, why
        self.fetch_whole()

    def fetch_whole(self) -> None:
        """Fetch the whole file. Raises as `copies.local_copy`."""
        download(self.video["uri"], self.path, self.video.get("size_bytes"))
        self._num_bytes += int(self.video.get("size_bytes") or 0)

    def fetch(self, recipe: IndexRecipe, surveyor: Decoder) -> None:
        """Fetch what the recipe needs of a remote file to the copy's path. Raises as `copies.local_copy`.

        Args:
            recipe: by which the video will be decoded.
            surveyor: reads the index of a sparse copy, which is as hostile as the rest of it.
        """
        uri, etag, size = self.video["uri"], self.video.get("etag"), self.video.get("size_bytes") or 0
        if not may_be_sparse(size) or not (self.is_part or may_need_little(recipe)):
            self.fetch_whole()
            return
        if not etag:
            self.complete("no etag")
            return
        remote = RemoteObject(uri, etag)
        try:
            self._fill(SparseCopy(remote, self.path, size), recipe, surveyor)
            self.is_sparse = True
        except WholeNeededError as error:
            self.complete(error.reason)
        except TerminalError as error:  # of the surveyor: what is wrong with it the whole file shall tell
            self.complete(error.code.value)
        finally:
            self._num_bytes += remote.num_bytes_read

    def _fill(self, copy: SparseCopy, recipe: IndexRecipe, surveyor: Decoder) -> None:
        """Fetch the index, learn from it what the recipe will show of the wanted units, and fetch that."""
        uri = self.video["uri"]
        persist(uri, copy.fetch_index)
        found = surveyor.survey(self.path, recipe.decode, recipe.segment_s)
        if isinstance(found, str):
            raise WholeNeededError(found)
        units = plan_units(recipe, found)
        segments = (segment for unit in self.wanted(units) for segment in units[unit])
        frames = [frame for segment in segments for frame in segment.frames]
        for wanted in ranges_of(copy, frames, surveyor):
            persist(uri, partial(copy.fetch, wanted))

    @property
    def told(self) -> dict[str, Any]:
        """The columns of a FRAMES row about what was fetched since the last one."""
        number, self._num_bytes = self._num_bytes, 0
        why, self.whole_because = self.whole_because, None
        return {"read_bytes": number, "whole_because": why}


def ranges_of(copy: SparseCopy, frames: list[int], surveyor: Decoder) -> Iterator[list[tuple[int, int]]]:
    """The ranges to be fetched to a surveyed copy, one round after the other, until it has what some frames need.

    Raises:
        WholeNeededError: there is no end of them.
    """
    for _ in range(_MAX_ROUNDS):
        ranges = surveyor.missing_ranges(copy.path, frames, copy.have)
        if not ranges:
            return
        yield ranges
    raise WholeNeededError("no end of ranges")


def may_need_little(recipe: IndexRecipe) -> bool:
    """Whether a recipe needs but a part of a long video: keyframes, or groups of pictures with others in between."""
    if recipe.decode == "keyframe" or recipe.segment_s is None:
        return True
    return recipe.segment_s / recipe.frames_per_segment > _USUAL_GROUP_S


def can_read_ahead(video: dict[str, Any], scratch_dir: str) -> bool:
    """Whether there is room now for a copy of a video besides the one in hand, so that nobody has to wait for it."""
    return is_local(video["uri"]) or has_room(2 * (video.get("size_bytes") or 0), scratch_dir)


@contextmanager
def video_copy(video: dict[str, Any], recipe: IndexRecipe, surveyor: Decoder, scratch_dir: str) -> Iterator[VideoCopy]:
    """The copy of a video (a row of tables.PLAN) for a recipe, for as long as the context lasts; it raises nothing."""
    copy = VideoCopy(video)
    if video.get("error_code"):  # its entry in the source already told
        yield copy
        return

    def fill(path: str) -> None:
        copy.path = path
        copy.fetch(recipe, surveyor)

    with ExitStack() as stack:
        try:
            copy.path = stack.enter_context(local_copy(video["uri"], scratch_dir, video.get("size_bytes"), fill))
        except PipelineError as error:
            copy.error = error
        yield copy
