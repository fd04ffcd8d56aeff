"""The clips to decode: a real scene encoded by codec, height and length of groups, and the lent clips as they are."""

import os
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.scaling import Scaler
from longvlm.schemas.errors import InputError

SCENE = "sam2__01_dog.mp4"  # twelve seconds of 720p, filmed by hand
FPS = 24
LONGEST_S = 60.0  # of a lent clip
# Encoder, its options, ending of the file. Without B-frames there is nothing to pass over.
_ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast", "bf": "3"}, "mp4"),
    "h264 without B-frames": ("libx264", {"preset": "veryfast", "tune": "zerolatency"}, "mp4"),
    "hevc": ("libx265", {"preset": "veryfast", "x265-params": "log-level=none:open-gop=0"}, "mp4"),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "7"}, "webm"),
    "av1": ("libsvtav1", {"preset": "11"}, "mp4"),
    "mpeg4": ("mpeg4", {}, "mp4"),
}


@dataclass(frozen=True)
class MadeClip:
    """How a clip is encoded: codec, height in pixels, frames from a keyframe to the next."""

    codec: str
    height: int
    group: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.codec.replace(' ', '-')}-{self.height}-{self.group}.{_ENCODERS[self.codec][2]}"


MADE = (
    *(MadeClip(codec, height, 48) for codec in ("h264", "h264 without B-frames") for height in (360, 720, 1080)),
    *(MadeClip(codec, 720, group) for codec in ("h264", "h264 without B-frames") for group in (12, 250)),
    *(MadeClip(codec, 720, 48) for codec in ("hevc", "vp9", "av1", "mpeg4")),
)


def lent_clips() -> list[Path]:
    """The lent clips that are not long.

    Raises:
        InputError: there are none.
    """
    good = Path(os.environ.get("LONGVLM_VIDEOS", "../shared/videos")) / "good"
    if not (good / SCENE).is_file():
        raise InputError(f"there is no {SCENE} in {good}; set LONGVLM_VIDEOS to the folder that holds `good`.")
    return [clip for clip in sorted(good.iterdir()) if _length_s(clip) <= LONGEST_S]


def _length_s(clip: Path) -> float:
    with av.open(str(clip), metadata_errors="replace") as container:
        return (container.duration or 0) / av.time_base


def make_clips(scene: Path, folder: Path) -> list[Path]:
    """Encode the scene in every way of `MADE`; what lies in the folder already is kept."""
    for height in sorted({clip.height for clip in MADE}):
        missing = [clip for clip in MADE if clip.height == height and not (folder / clip.name).exists()]
        if missing:
            size, scaler = (height, height * 16 // 9), Scaler()
            with av.open(str(scene)) as container:
                frames = [scaler.scale(frame, size) for frame in container.decode(video=0)]
            for clip in missing:
                encode(clip, frames, folder / clip.name)
    return [folder / clip.name for clip in MADE]


def encode(clip: MadeClip, frames: list[NDArray[np.uint8]], path: Path) -> None:
    """Encode RGB frames [height, width, 3] to a file."""
    encoder, options, ending = _ENCODERS[clip.codec]
    draft = path.with_name(f"draft.{ending}")
    with av.open(str(draft), "w") as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", clip.group
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    draft.replace(path)
