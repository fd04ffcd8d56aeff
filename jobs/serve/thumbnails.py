"""Thumbnails on demand: a small JPEG near the middle of a segment, from a confined decoder, kept while there is room.

A store may hold none, and few videos are looked at: each is made when it is asked for.
"""

import io
import threading
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve.library import BusyError, Row
from longvlm.jobs.serve.media import media_file
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.times import TimedVideo
from longvlm.pipeline.uris import is_local
from longvlm.schemas.errors import InputError, PipelineError

SIZE = (90, 160)  # height and width, pixels
_QUALITY = 60  # about 4 kB
_MAX_FAILED = 10_000


class Thumbnails:
    """Thumbnails by write id and segment. A write never changes, so neither does its thumbnail."""

    def __init__(self) -> None:
        self._decoder = Decoder(SERVE.decode_s, SERVE.decode_bytes)
        self._info: TimedVideo | None = None  # of the video that the decoder holds open
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # the one not looked at for longest comes first
        self._num_bytes = 0
        self._failed: OrderedDict[str, None] = OrderedDict()  # writes that no thumbnail can be made of
        self._lock, self._in_hand = threading.Lock(), threading.Lock()
        self._turns = threading.BoundedSemaphore(SERVE.thumbnails_waiting)

    def get(self, video: Row, segment: Row) -> bytes | None:
        """The JPEG of a segment; None where the video gives none.

        Args:
            video: a row of the view live_videos.
            segment: its segment, start_s and end_s.

        Raises:
            BusyError: too many wait for the decoder.
        """
        key = (video["write_id"], segment["segment"])
        if (found := self._find(key)) is not None:
            return found
        if not is_local(video["uri"]):  # of a bucket's videos none are made
            return None
        if not self._turns.acquire(blocking=False):
            raise BusyError
        try:
            with self._in_hand:  # one decoder, and of those who want the same only the first makes it
                if (found := self._find(key)) is not None or video["write_id"] in self._failed:
                    return found
                return self._make(video, key, segment)
        finally:
            self._turns.release()

    def close(self) -> None:
        """End the decoder's process."""
        self._decoder.close()

    def _find(self, key: tuple[str, int]) -> bytes | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _make(self, video: Row, key: tuple[str, int], segment: Row) -> bytes | None:
        try:
            jpeg = as_jpeg(self._frame(media_file(video).check_local(), segment["start_s"], segment["end_s"]))
        except (PipelineError, InputError):  # that a picture is missing is seen; the player says what is wrong
            self._failed[key[0]] = None
            while len(self._failed) > _MAX_FAILED:
                self._failed.popitem(last=False)
            return None
        with self._lock:
            self._kept[key] = jpeg
            self._num_bytes += len(jpeg)
            while self._num_bytes > SERVE.thumbnail_bytes:
                self._num_bytes -= len(self._kept.popitem(last=False)[1])
        return jpeg

    def _frame(self, path: str, start_s: float, end_s: float) -> NDArray[np.uint8]:
        """The frame in the middle of a segment, [height, width, 3], with black where the video's shape is another.

        Of a video whose keyframes are no farther apart than a segment is long, the keyframe that is nearest.
        """
        if self._info is None or self._decoder.probed != (path, False):
            self._info = self._decoder.probe(path, "keyframe", end_s - start_s)
        frame = self._info.frame_at((start_s + end_s) / 2)
        return self._decoder.decode(path, [frame], SIZE, "keyframe", "letterbox").frames[0]


def as_jpeg(frame: NDArray[np.uint8]) -> bytes:
    """A frame [height, width, 3], RGB, as a JPEG."""
    written = io.BytesIO()
    Image.fromarray(frame).save(written, "JPEG", quality=_QUALITY, optimize=True)
    return written.getvalue()
