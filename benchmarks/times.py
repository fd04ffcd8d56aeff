"""Whether every sampled picture is the one that is shown at its time, held against plain decoding from the first frame.

    LONGVLM_VIDEOS=../shared/videos python -m benchmarks.times

The files are those of $LONGVLM_VIDEOS/good and reports, and some made here with a number burnt into each frame. PyAV
decodes each from its start to its end, without seeking and without an index; the picture at t is then the last
with pts <= t. In exact mode every picture that the recipes `long` and `tiny` take is compared with that: by its number
in made files, else by its pixels, which may differ by the rounding of two resizers, or in files with damaged packets,
whose pictures depend on how they are reached, by the time of the frame. Keyframe mode is asked how far in
time its pictures lie from those. `paper` counts frames and is left out. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.sampling import plan_segments
from longvlm.pipeline.decode.scaling import orientation_of
from longvlm.pipeline.decode.times import NS
from longvlm.pipeline.decode.video import KEYFRAMES
from longvlm.schemas.errors import TerminalError
from longvlm.schemas.recipe import IndexRecipe, long, tiny
from longvlm.schemas.tower import TowerSpec

PX, BLOCK = 64, 8  # pixels of a picture; of a bit in made ones
LARGEST_DIFFERENCE = 2.0  # mean of levels: two resizers differ by 0.1, neighbouring pictures of a moving scene by more
TOWER = TowerSpec("none", "none", 4, (4, 4), 64, PX, has_cls=True, search_dim=None)


def decode_plainly(path: Path) -> tuple[list[int], list[NDArray[np.uint8]], bool]:
    """When each frame is shown (nanoseconds from the first), what it shows, [PX, PX, 3], and whether all is whole."""
    is_whole = True
    stamps: list[int | None] = []
    pictures: list[NDArray[np.uint8]] = []
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        assert stream.time_base is not None
        stream.codec_context.thread_count = 1  # what damaged packets show depends on it
        stream.codec_context.thread_type = "NONE"
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                is_whole = False
                continue
            for frame in frames:
                assert isinstance(frame, av.VideoFrame)
                stamps.append(frame.pts)
                small = frame.reformat(PX, PX, "rgb24", interpolation="BILINEAR").to_ndarray()
                orientation = orientation_of(frame)
                pictures.append(small if orientation is None else orientation.apply(small))
        if not is_whole:  # a decoder that has lost its way may give frames out of order
            stamps = [*sorted(stamp for stamp in stamps if stamp is not None)]
        return _times_ns(stamps, stream.time_base), pictures, is_whole


def _times_ns(stamps: list[int | None], time_base: Fraction) -> list[int]:
    """Times by stamps; where they are missing or go back, even steps in the order of the frames."""
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps) or any(after < before for before, after in pairwise(known)):
        step = median(after - before for before, after in pairwise(sorted(set(known)))) if known else 0
        return [round(number * step * time_base * 10**9) for number in range(len(stamps))]
    return [round((stamp - known[0]) * time_base * 10**9) for stamp in known]


def moments(recipe: IndexRecipe, segments: list[Any]) -> list[float]:
    """The centres of the slots that the frames of segments stand for, in seconds."""
    assert recipe.segment_s is not None
    slot_s = recipe.segment_s / recipe.frames_per_segment
    return [segment.start_s + (slot + 0.5) * slot_s for segment in segments for slot in range(segment.num_frames)]


def check_exact(decoder: Decoder, path: Path, *, is_made: bool) -> tuple[int, int]:
    """How many sampled pictures of a file there are, and how many are not those of their times."""
    decoder.probe(str(path))  # what has no decoder says so
    times_ns, pictures, is_whole = decode_plainly(path)
    num_frames = num_wrong = 0
    for recipe in (long(TOWER), tiny(TOWER)):
        video = decoder.probe(str(path), "exact", recipe.segment_s)
        segments = plan_segments(recipe, video)
        asked = [frame for segment in segments for frame in segment.frames]
        for start in range(0, len(asked), 100):
            shown = decoder.decode(str(path), asked[start : start + 100], (PX, PX))
            for i, moment in enumerate(moments(recipe, segments)[start : start + 100]):
                moment_ns = round(moment * NS)
                right = max(bisect_right(times_ns, moment_ns) - 1, 0)
                num_frames += 1
                if is_whole:
                    is_right = _is_same(shown.frames[shown.places[i]], pictures[right], right if is_made else None)
                else:
                    is_right = times_ns[right] <= video.times_ns[shown.shown[i]] <= moment_ns
                num_wrong += not is_right
    return num_frames, num_wrong


def _is_same(shown: NDArray[np.uint8], right: NDArray[np.uint8], number: int | None) -> bool:
    if number is not None:
        return read_bits(shown) == number
    return float(np.abs(shown.astype(int) - right).mean()) < LARGEST_DIFFERENCE


def keyframe_shift_s(decoder: Decoder, path: Path) -> float:
    """How far in time the farthest picture of keyframe mode lies from the one that it stands for."""
    farthest = 0.0
    for recipe in (long(TOWER), tiny(TOWER)):
        video = decoder.probe(str(path), "keyframe", recipe.segment_s)
        asked = [frame for segment in plan_segments(recipe, video) for frame in segment.frames]
        for start in range(0, len(asked), 100):
            wanted = asked[start : start + 100]
            decoded = decoder.decode(str(path), wanted, (PX, PX), "keyframe")
            if decoded.decoder == KEYFRAMES:
                shifts = np.abs(video.times_ns[list(decoded.shown)] - video.times_ns[wanted])
                farthest = max(farthest, float(shifts.max()) / NS)
    return farthest


def write_numbered(path: Path, times_s: list[float]) -> None:
    """Write a file whose frame i, shown at times_s[i], shows the bits of i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "3"})
        stream.width = stream.height = PX
        stream.pix_fmt, stream.gop_size = "yuv420p", 40
        stream.codec_context.time_base = stream.time_base = Fraction(1, 90_000)
        for number, time_s in enumerate(times_s):
            bits = (number >> np.arange(PX // BLOCK * 2)) & 1
            rows = (bits * 255).astype(np.uint8).reshape(2, -1)
            grey = np.kron(rows, np.ones((PX // 2, BLOCK), np.uint8))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.stack([grey] * 3, axis=-1)), format="rgb24")
            frame.pts, frame.time_base = round(time_s * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_bits(picture: NDArray[np.uint8]) -> int:
    """The number that a picture of `write_numbered` shows."""
    centres = picture[PX // 4 :: PX // 2, BLOCK // 2 :: BLOCK].mean(axis=-1).reshape(-1) > 127
    return int((centres << np.arange(len(centres))).sum())


def make_files(folder: Path) -> list[Path]:
    """Files of constant and variable rates, in several containers, a number burnt into each frame."""
    steady = [number / 25 for number in range(1000)]
    rng = np.random.default_rng(0)
    shaky = np.cumsum(rng.choice([0.02, 0.04, 0.1, 0.9, 7.0], 400, p=[0.3, 0.4, 0.2, 0.08, 0.02])).tolist()
    held = [time_s for time_s in steady if time_s >= 20 or time_s % 1.5 < 0.02]
    for name, times_s in {"steady": steady, "shaky": shaky, "held": held}.items():
        for ending in ("mp4", "mkv", "ts"):
            write_numbered(folder / f"{name}.{ending}", times_s)
    return sorted(folder.iterdir())


def main() -> None:
    """Check every file and print a line for each."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    av.logging.set_level(None)
    lent = Path(os.environ.get("LONGVLM_VIDEOS", "../shared/videos"))
    found: dict[str, Any] = {"wrong": 0, "frames": 0, "files": 0, "keyframe_max_shift_s": 0.0, "failed": []}
    with tempfile.TemporaryDirectory() as scratch, Decoder(600, 4 << 30) as decoder:
        made = make_files(Path(scratch))
        for path in [*made, *sorted(lent.glob("good/*")), *sorted(lent.glob("reports/*.[amt][pvs]*"))]:
            try:
                num_frames, num_wrong = check_exact(decoder, path, is_made=path in made)
                shift_s = keyframe_shift_s(decoder, path)
            except (TerminalError, av.FFmpegError) as error:  # what no player shows either
                found["failed"].append(path.name)
                print(f"  {path.name:45} {error}")
                continue
            print(f"  {path.name:45} {num_frames:6} pictures, {num_wrong} wrong; keyframes {shift_s:.2f} s off at most")
            found["files"] += 1
            found["frames"] += num_frames
            found["wrong"] += num_wrong
            found["keyframe_max_shift_s"] = max(found["keyframe_max_shift_s"], round(shift_s, 3))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
