"""Long files made of real clips: groups of pictures of a known length, strung together anew for each file.

A clip is encoded once for each length of group (H.264, CRF 23, at most 1280 wide, closed groups); files are made of
these groups in an order of their own, without encoding again, with the clip's sound between. What was made is kept in a
folder and described in `corpus.json`.
"""

import json
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av

from longvlm.schemas.errors import InputError

GROUPS_S = (2, 5, 10)
FORMS = ("faststart", "mp4", "mkv")
MASTER_S = 40  # of a clip, repeated, that is encoded
LEAST_BYTES = 20 << 20  # of a file
WIDTH = 1280  # of their pictures at most
_LEAST_S = 4.0  # of a clip; shorter ones show the same again in every group
_LEAST_BITS_PER_S = 300e3  # of a clip; what has less is black or a test card, and would fill a file in hours
_LATER_FRAMES = 7  # each time that a clip is repeated, so that no two keyframes are the same picture


@dataclass(frozen=True)
class LongFile:
    """A file of the corpus, and what can at best be left out of reading it."""

    name: str
    clip: str
    group_s: int
    form: str
    size_bytes: int
    keyframe_bytes: int  # of its pictures; the index comes on top


@dataclass
class _Master:
    """Groups of encoded packets: (bytes, decoding and presentation time from the group's begin, is it the keyframe)."""

    path: Path
    group_ticks: int
    time_base: Fraction
    groups: list[list[tuple[bytes, int, int, bool]]]


def clips_to_lengthen() -> list[Path]:
    """The lent clips that there is enough in to make a long file of."""
    good = Path(os.environ.get("LONGVLM_VIDEOS", "../shared/videos")) / "good"
    if not good.is_dir():
        raise InputError(f"there are no clips at {good}; set LONGVLM_VIDEOS to the folder that holds `good`.")
    return [clip for clip in sorted(good.iterdir()) if _has_enough(clip)]


def _has_enough(clip: Path) -> bool:
    with av.open(str(clip), metadata_errors="replace") as container:
        length_s = (container.duration or 0) / av.time_base
        if not length_s:  # a header need not tell it
            stream = container.streams.video[0]
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            length_s = float((max(stamps) - min(stamps)) * (stream.time_base or 0))
    return length_s >= _LEAST_S and clip.stat().st_size * 8 >= _LEAST_BITS_PER_S * length_s


def make_corpus(
    folder: Path,
    clips: Sequence[Path],
    num_files: int,
    *,
    least_bytes: int = LEAST_BYTES,
    width: int = WIDTH,
    master_s: int = MASTER_S,
) -> list[LongFile]:
    """Make files below `folder / "bucket"` where they are not there yet, on two processes, and tell what each is."""
    described = folder / "corpus.json"
    made = {row["name"]: LongFile(**row) for row in json.loads(described.read_text())} if described.exists() else {}
    wanted = [_draw(number, clips) for number in range(num_files)]
    missing = [draw for draw in wanted if draw[0] not in made]
    if missing:
        (folder / "bucket").mkdir(parents=True, exist_ok=True)
        (folder / "masters").mkdir(exist_ok=True)
        needed = sorted({draw[1] for draw in missing})
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            encode = partial(_encode_masters, folder / "masters", width, master_s)
            list(pool.map(encode, needed))
            for file in pool.map(partial(_string_together, folder, least_bytes), missing):
                made[file.name] = file
        described.write_text(json.dumps([asdict(file) for file in made.values()], indent=1))
    return [made[name] for name, *_ in wanted]


def _draw(number: int, clips: Sequence[Path]) -> tuple[str, Path, int, str, int]:
    """Name, clip, length of groups, form and seed of a file: nine files have all kinds, of clips in turn."""
    kinds = list(product(GROUPS_S, FORMS))
    group_s, form = kinds[number % len(kinds)]
    clip = clips[(number + number // len(kinds)) % len(clips)]
    ending = "mkv" if form == "mkv" else "mp4"
    return f"{number:03}-{clip.stem}-{group_s}s-{form}.{ending}", clip, group_s, form, number


# --- masters: a clip encoded once for each length of group ---


def _encode_masters(folder: Path, width: int, master_s: int, clip: Path) -> None:
    """Encode a clip with every length of group at once, since decoding and scaling cost as much as encoding."""
    paths = [_master_path(folder, clip, group_s) for group_s in GROUPS_S]
    if all(path.exists() for path in paths):
        return
    with av.open(str(clip), metadata_errors="replace") as container:
        video = container.streams.video[0]
        width = min(width, video.width) // 2 * 2
        height = round(width * video.height / video.width / 2) * 2
        rate = max(round(float(video.average_rate or 25)), 1)
    outputs = []
    for path, group_s in zip(paths, GROUPS_S, strict=True):
        output = av.open(str(path.with_suffix(".part")), "w", format="mp4")
        group = str(group_s * rate)
        options = {"preset": "veryfast", "crf": "23", "g": group, "keyint_min": group, "sc_threshold": "0"}
        stream = output.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        outputs.append((output, stream))
    for number, frame in enumerate(islice(_repeated(clip), master_s * rate)):
        small = frame.reformat(width, height, "yuv420p")
        small.pts, small.time_base = number, Fraction(1, rate)
        small.pict_type = 0  # as the encoder likes, not as it was
        for output, stream in outputs:
            output.mux(stream.encode(small))
    for output, stream in outputs:
        output.mux(stream.encode(None))
        output.close()
    for path in paths:
        path.with_suffix(".part").rename(path)


def _master_path(folder: Path, clip: Path, group_s: int) -> Path:
    return folder / f"{clip.stem}-{group_s}s.mp4"


def _repeated(clip: Path) -> Iterator[av.VideoFrame]:
    """The frames of a clip again and again, a little later each time."""
    later = 0
    while True:
        with av.open(str(clip), metadata_errors="replace") as container:
            container.streams.video[0].thread_type = "AUTO"
            yield from islice(container.decode(video=0), later, None)
        later += _LATER_FRAMES


def _read_master(path: Path, group_s: int) -> _Master:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        group_ticks = round(group_s / stream.time_base)
        groups: list[list[tuple[bytes, int, int, bool]]] = []
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.is_keyframe:
                groups.append([])
            base = (len(groups) - 1) * group_ticks
            assert packet.dts is not None
            assert packet.pts is not None
            groups[-1].append((bytes(packet), packet.dts - base, packet.pts - base, packet.is_keyframe))
        return _Master(path, group_ticks, stream.time_base, groups)


# --- files: groups in an order of their own ---


def _string_together(folder: Path, least_bytes: int, draw: tuple[str, Path, int, str, int]) -> LongFile:
    """Write one file of groups drawn by its seed, until it is large enough, with the clip's sound between."""
    name, clip, group_s, form, seed = draw
    master = _read_master(_master_path(folder / "masters", clip, group_s), group_s)
    rng = random.Random(seed)
    target = folder / "bucket" / name
    options = {"movflags": "faststart"} if form == "faststart" else {}
    keyframe_bytes = num_bytes = 0
    with (
        av.open(str(master.path)) as source,
        av.open(str(clip), metadata_errors="replace") as heard,
        av.open(str(target), "w", options=options) as output,
    ):
        video = output.add_stream_from_template(source.streams.video[0])
        aac = next((one for one in heard.streams.audio if one.codec_context.name == "aac"), None)
        track = output.add_stream_from_template(aac) if aac else None
        sound = _sound(heard, aac, track) if aac else iter(())
        ahead = next(sound, None)
        number, order = 0, list(range(len(master.groups)))
        while num_bytes < least_bytes:
            if number % len(order) == 0:
                rng.shuffle(order)
            base = number * master.group_ticks
            for data, dts, pts, is_keyframe in master.groups[order[number % len(order)]]:
                packet = av.Packet(data)
                packet.stream, packet.time_base = video, master.time_base
                packet.dts, packet.pts, packet.is_keyframe = base + dts, base + pts, is_keyframe
                while ahead is not None and ahead.pts * ahead.time_base <= (base + dts) * master.time_base:
                    num_bytes += ahead.size
                    output.mux(ahead)
                    ahead = next(sound, None)
                output.mux(packet)
                num_bytes += len(data)
                keyframe_bytes += len(data) if is_keyframe else 0
            number += 1
    return LongFile(name, clip.name, group_s, form, target.stat().st_size, keyframe_bytes)


def _sound(container: Any, stream: Any, track: Any) -> Iterator[av.Packet]:
    """The packets of a clip's sound again and again, with stamps that go on."""
    packets = [(bytes(packet), packet.duration) for packet in container.demux(stream) if packet.size]
    stamp = 0
    while packets:
        for data, duration in packets:
            packet = av.Packet(data)
            packet.stream, packet.time_base = track, stream.time_base
            packet.dts = packet.pts = stamp
            packet.duration = duration
            yield packet
            stamp += duration or 1
