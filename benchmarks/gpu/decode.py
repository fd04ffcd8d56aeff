"""Videos on the GPU's own decoder: whether its frames are those of the CPU, hash by hash, and how many a second.

Both decode in the index job's confined child, so that the sandbox is tried as well. PyAV has to be there.
"""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.section import Found, Run, check

if TYPE_CHECKING:
    from longvlm.pipeline.decode.isolate import Decoder

PX, MOST_FRAMES = 224, 300  # decoded of a clip, and how large
AT_ONCE = 8  # decoders that share a card
DEADLINE_S, MEMORY_BYTES = 120.0, 4 << 30
MISSING = "PyAV (`av`) is not installed here, so no video was decoded; the section needs it and nothing else."


def run(run: Run) -> None:
    """Decode made clips of each codec, and the lent ones where they are, by both; then one by several at once."""
    if find_spec("av") is None:
        run.note(skipped=MISSING)
        run.say(MISSING)
        return
    from longvlm.pipeline.decode.isolate import Decoder

    with TemporaryDirectory() as folder:
        clips = [*made_clips(Path(folder), is_tiny=run.is_tiny), *lent_clips(is_tiny=run.is_tiny)]
        with Decoder(DEADLINE_S, MEMORY_BYTES) as cpu, Decoder(DEADLINE_S, MEMORY_BYTES, "cuda") as card:
            for path in clips:
                run.part(path.name, lambda path=path: both(run, path, cpu, card))  # type: ignore[misc] # no default
        if not run.is_tiny:
            run.part("together", lambda: together(run, next(iter(made_clips(Path(folder), is_tiny=False)))))


def made_clips(folder: Path, *, is_tiny: bool) -> list[Path]:
    """Clips of a bright square that moves over noise, in each codec that a card may have, and in AV1."""
    from benchmarks.decoders.clips import MadeClip, encode

    heights = (96,) if is_tiny else (1080, 720)
    paths = []
    for height in heights:
        clips = [MadeClip(codec, height, 48) for codec in ("h264", "hevc", "vp9", "av1")]
        missing = [clip for clip in clips if not (folder / clip.name).exists()]
        frames = scene(height, 24 if is_tiny else 120) if missing else []
        for clip in missing:
            encode(clip, frames, folder / clip.name)
        paths += [folder / clip.name for clip in clips]
    return paths


def scene(height: int, num_frames: int) -> list[Any]:
    """RGB frames [height, width, 3]."""
    rng, width = np.random.default_rng(0), height * 16 // 9
    ground = rng.integers(0, 120, (height, width, 3), dtype=np.uint8)
    frames = []
    for number in range(num_frames):
        frame = np.roll(ground, 2 * number, axis=1)
        frame[height // 4 : height // 2, number * 4 % (width // 2) :][:, : height // 4] = 240
        frames.append(frame)
    return frames


def lent_clips(*, is_tiny: bool) -> list[Path]:
    """The clips of $LONGVLM_VIDEOS, if there are any and it is no rehearsal."""
    good = Path(os.environ.get("LONGVLM_VIDEOS", "../shared/videos")) / "good"
    return sorted(good.iterdir()) if good.is_dir() and not is_tiny else []


def both(run: Run, path: Path, cpu: "Decoder", card: "Decoder") -> Found:
    """A clip decoded by the CPU and by the card."""
    found: Found = {}
    hashes: dict[str, list[str]] = {}
    for device, decoder in (("cpu", cpu), ("cuda", card)):
        decode_all(decoder, path, 1)  # the child, its libraries and the device are there
        started_s = time.perf_counter()
        hashes[device], because = decode_all(decoder, path, MOST_FRAMES)
        found[f"{device}_frames_per_s"] = len(hashes[device]) / (time.perf_counter() - started_s)
    different = sum(one != other for one, other in zip(hashes["cpu"], hashes["cuda"], strict=True))
    found |= {"frames": len(hashes["cpu"]), "different": different, "cpu_because": because}
    where = f"on the CPU all the same ({because})" if because else f"{found['cuda_frames_per_s']:.0f} on the card"
    run.say(f"{path.name}: frames a second: {found['cpu_frames_per_s']:.0f} on a core, {where}")
    check(different == 0, f"{different} of {len(hashes['cpu'])} frames of {path.name} are others on the card.")
    return found


def decode_all(decoder: "Decoder", path: Path, most: int) -> tuple[list[str], str | None]:
    """The hashes of a clip's first frames, and why no card decoded them, if so."""
    info = decoder.probe(str(path))
    hashes: list[str] = []
    because = None
    for first in range(0, min(info.num_frames, most), 100):
        wanted = list(range(first, min(first + 100, info.num_frames, most)))
        decoded = decoder.decode(str(path), wanted, (PX, PX))
        hashes += [hashlib.sha256(frame.tobytes()).hexdigest() for frame in decoded.frames]
        because = decoded.cpu_because
    return hashes, because


def together(run: Run, path: Path) -> Found:
    """A clip decoded by as many at once as share a card in the index job."""
    from longvlm.pipeline.decode.isolate import Decoder

    found: Found = {"decoders": AT_ONCE}
    for device in ("cpu", "cuda"):
        decoders = [Decoder(DEADLINE_S, MEMORY_BYTES, device) for _ in range(AT_ONCE)]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(lambda decoder: decode_all(decoder, path, 1), decoders))
            started_s = time.perf_counter()
            hashes = list(threads.map(lambda decoder: decode_all(decoder, path, MOST_FRAMES)[0], decoders))
            found[f"{device}_frames_per_s"] = sum(map(len, hashes)) / (time.perf_counter() - started_s)
        for decoder in decoders:
            decoder.close()
    run.say(f"{AT_ONCE} at once: {found['cpu_frames_per_s']:.0f} frames/s on cores, {found['cuda_frames_per_s']:.0f}")
    return found
