"""Visual tokens for the ablation: videos of the tiny world, encoded once by the shipped tower."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from longvlm import tinyworld
from longvlm.pipeline.vision.merge import merge
from longvlm.pipeline.vision.towers.contract import Tower
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas.recipe import halving_schedule
from longvlm.tinyworld.render import write_video
from longvlm.tinyworld.scenes import draw_scene
from longvlm.tinyworld.tower import FRAMES_PER_SEGMENT, decode_frames

KEPT = (4, 8, 16, 32)  # tokens a segment
VIDEOS_PER_FILE = 100


@dataclass(frozen=True, eq=False)
class KeptRows:
    """All visual tokens of a video that a prefix may hold, float16 as a store would hold it."""

    local: dict[int, Tensor]  # by tokens kept a segment: [segments, kept, D]
    cls: Tensor  # [layers, D]: mean over all frames, of the last five states
    patches: Tensor  # [P, D]: mean of every patch over time
    frames: Tensor  # [segments, frames, D]: mean of every frame over its patches


@cache
def read_rows(work: Path, seed: int, num_videos: int) -> list[KeptRows]:
    """Read the tokens of videos `0 .. num_videos` of a seed; what is watched is kept in the folder."""
    tower = load_tower(f"{tinyworld.MODEL}/tower")
    rows: list[KeptRows] = []
    for start in range(0, num_videos, VIDEOS_PER_FILE):
        path = work / "tokens" / f"{seed}-{start:05}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".draft")
            torch.save([vars(_watch(tower, seed, start + i)) for i in range(VIDEOS_PER_FILE)], draft)
            draft.rename(path)
        rows += [KeptRows(**parts) for parts in torch.load(path, weights_only=True)]
    return rows[:num_videos]


def _watch(tower: Tower, seed: int, number: int) -> KeptRows:
    """One video: written, decoded, encoded and merged as an index would."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, draw_scene(seed, number))
        frames = torch.from_numpy(decode_frames(path))
    encoded = tower.encode(frames)
    if encoded.cls is None:
        raise ValueError("the tiny world's tower has a CLS token")
    patches = encoded.patches.float().view(
        -1, FRAMES_PER_SEGMENT, *encoded.patches.shape[1:]
    )  # [segments, frames, P, D]
    together = patches.flatten(1, 2)
    local = {kept: merge(together, halving_schedule(together.shape[1], kept)).tokens.half() for kept in KEPT}
    return KeptRows(local, encoded.cls.mean(0).half(), patches.mean((0, 1)).half(), patches.mean(2).half())
