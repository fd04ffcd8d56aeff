"""Thumbnails: those that the store holds, else made on demand by a confined decoder and kept while there is room."""

import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve.media import MediaFile, media_file
from longvlm.jobs.serve.pinned import BusyError, Row
from longvlm.pipeline.decode.copy import ranges_of
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.scaling import fitted
from longvlm.pipeline.decode.times import TimedVideo
from longvlm.pipeline.decode.units import THUMBNAIL_PX, thumbnail
from longvlm.pipeline.source.fetch import WholeNeededError
from longvlm.pipeline.source.ranges import RemoteObject
from longvlm.pipeline.source.scratch import ScratchFolder, scratch_file
from longvlm.pipeline.source.sparse import SparseCopy, may_be_sparse
from longvlm.pipeline.uris import is_local, refusals_as_sentences
from longvlm.schemas.errors import InputError, PipelineError

_RETRY_S = 60.0
_MAX_FAILED = 10_000


class Thumbnails:
    """Thumbnails by write id and segment. A write never changes, so neither does its thumbnail."""

    def __init__(self) -> None:
        self._decoder = Decoder(SERVE.decode_s, SERVE.decode_bytes)
        self._scratch = ScratchFolder()
        self._info: TimedVideo | None = None  # of the video that the decoder holds open
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # the one not looked at for longest comes first
        self._num_bytes = 0
        self._failed: OrderedDict[str, float] = OrderedDict()  # writes that none could be made of, and when
        self._lock, self._in_hand = threading.Lock(), threading.Lock()
        self._turns = threading.BoundedSemaphore(SERVE.thumbnails_waiting)

    def get(self, video: Row, segment: Row) -> bytes | None:
        """The JPEG of a segment; None where the video gives none.

        Args:
            video: a row of the view live_videos.
            segment: its segment, start_s, end_s and thumbnail.

        Raises:
            BusyError: too many wait for the decoder.
        """
        if segment["thumbnail"] is not None:
            return bytes(segment["thumbnail"])
        key = (video["write_id"], segment["segment"])
        if (found := self._find(key)) is not None:
            return found
        if not self._turns.acquire(blocking=False):
            raise BusyError
        try:
            with self._in_hand:  # one decoder, and of those who want the same only the first makes it
                if (found := self._find(key)) is not None or self._has_failed(key[0]):
                    return found
                return self._make(video, key, segment)
        finally:
            self._turns.release()

    def close(self) -> None:
        """End the decoder's process, and remove its folder."""
        self._decoder.close()
        self._scratch.close()

    def _find(self, key: tuple[str, int]) -> bytes | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _has_failed(self, write_id: str) -> bool:
        return time.monotonic() - self._failed.get(write_id, float("-inf")) < _RETRY_S

    def _make(self, video: Row, key: tuple[str, int], segment: Row) -> bytes | None:
        try:
            frame = self._frame(media_file(video), segment["start_s"], segment["end_s"])
            jpeg = thumbnail(frame, frame.shape[:2])
        except (PipelineError, InputError):  # that a picture is missing is seen; the player says what is wrong
            self._failed[key[0]] = time.monotonic()
            while len(self._failed) > _MAX_FAILED:
                self._failed.popitem(last=False)
            return None
        with self._lock:
            self._kept[key] = jpeg
            self._num_bytes += len(jpeg)
            while self._num_bytes > SERVE.thumbnail_bytes:
                self._num_bytes -= len(self._kept.popitem(last=False)[1])
        return jpeg

    def _frame(self, file: MediaFile, start_s: float, end_s: float) -> NDArray[np.uint8]:
        """The frame in the middle of a segment, [height, width, 3], in the shape of the video.

        Of a video whose keyframes are no farther apart than a segment is long, the keyframe that is nearest.

        Raises:
            InputError: the file is not there as it was indexed, or a remote one would have to be fetched whole.
            PipelineError: it cannot be decoded.
        """
        if is_local(file.uri):
            return self._decoded(file.check_local(), start_s, end_s, is_sparse=False)
        with scratch_file(self._scratch.name, "") as path:
            with refusals_as_sentences("the video"):
                self._fetch(file, path, start_s, end_s)
            try:
                return self._decoded(path, start_s, end_s, is_sparse=may_be_sparse(file.size_bytes))
            finally:
                self._decoder.close_video()  # whose file goes

    def _fetch(self, file: MediaFile, path: str, start_s: float, end_s: float) -> None:
        """Fetch a remote file's index and one keyframe of it to a path, and of a small file all.

        Raises:
            WholeNeededError: that will not do. And whatever its filesystem raises.
        """
        if not file.etag:
            raise WholeNeededError("no etag")
        remote = RemoteObject(file.uri, file.etag)
        if not may_be_sparse(file.size_bytes):
            Path(path).write_bytes(remote.read([(0, file.size_bytes)])[0])
            return
        copy = SparseCopy(remote, path, file.size_bytes)
        copy.fetch_index()
        found = self._decoder.survey(path, "keyframe", end_s - start_s)
        if isinstance(found, str):
            raise WholeNeededError(found)
        for ranges in ranges_of(copy, [found.frame_at((start_s + end_s) / 2)], self._decoder):
            copy.fetch(ranges)

    def _decoded(self, path: str, start_s: float, end_s: float, *, is_sparse: bool) -> NDArray[np.uint8]:
        if self._info is None or self._decoder.probed != (path, is_sparse):
            self._info = self._decoder.probe(path, "keyframe", end_s - start_s, is_sparse=is_sparse)
        frame = self._info.frame_at((start_s + end_s) / 2)
        size = fitted((self._info.height, self._info.width), (THUMBNAIL_PX, THUMBNAIL_PX))
        return self._decoder.decode(path, [frame], size, "keyframe").frames[0]
