"""The reference's outputs, found in the goldens folder by what they hold, and each read once a session."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from near_ties import Merging

from longvlm.pipeline.models.longvlm.model import LongVLM, load_longvlm
from longvlm.pipeline.models.prompt import PATCH
from longvlm.pipeline.vision.towers.contract import Encoded, Tower
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas.recipe import IndexRecipe
from support import GOLDENS, lent, missing, parameters

REFERENCE_PX = 224  # what every frame is resized to first (LONGVLM.md, 2)


@cache
def read_json(path: str | Path) -> Any:
    """A file of the goldens folder, by its name in there or its whole path; not to be changed."""
    return json.loads(lent(GOLDENS / path).read_text())


@cache
def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """An .npz file of the goldens folder; not to be changed."""
    with np.load(lent(path)) as arrays:
        return dict(arrays)


@dataclass(frozen=True)
class Golden:
    """A language model and its outputs: full/, base/, mm_projector.*, golden.json, golden.npz."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        return read_json(self.folder / "golden.json")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return read_arrays(self.folder / "golden.npz")

    @property
    def projector(self) -> Path:
        return next(iter(sorted(self.folder.glob("mm_projector.*"))), None) or missing(self.folder, "mm_projector")

    @cached_property
    def models(self) -> dict[str, LongVLM]:
        """The same model, loaded in both of the reference's layouts."""
        return {
            "full": load_longvlm(str(self.folder / "full")),
            "base": load_longvlm(str(lent(self.folder / "base")), projector=str(self.projector)),
        }


@dataclass(frozen=True)
class Record:
    """One prompt of a golden and what the reference made of it."""

    golden: Golden
    index: int

    @property
    def about(self) -> dict[str, Any]:
        return self.golden.about["records"][self.index]

    def array(self, name: str) -> np.ndarray:
        return self.golden.arrays[f"{self.about['key']}_{name}"]

    @property
    def use_start_end(self) -> bool:
        return self.about.get("use_vid_start_end", True)

    @property
    def prompt(self) -> str:
        return self.about["prompt"].replace("{PATCHES}", PATCH * self.about["video_token_len"])

    @property
    def prefix(self) -> torch.Tensor:
        local, memory = self.golden.arrays["local"], self.golden.arrays["memory"]
        num_memory = self.about["video_token_len"] - len(local)
        return torch.from_numpy(np.concatenate([memory[len(memory) - num_memory :], local]))


@dataclass(frozen=True)
class Clip:
    """A tower and what became of one video in it: model/, meta.json, golden.npz, perhaps the video as a file."""

    folder: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        return read_json(self.folder / "meta.json")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return read_arrays(self.folder / "golden.npz")

    @property
    def video(self) -> Path | None:
        return next(iter(sorted(self.folder.glob("video.*"))), None)

    @cached_property
    def tower(self) -> Tower:
        """In float32 on the CPU."""
        return load_tower(str(self.folder / "model"))

    @cached_property
    def frames(self) -> torch.Tensor:
        """Those that the reference encoded, resized by nearest as it did."""
        if "decoded_frames" in self.arrays:
            frames = self.arrays["decoded_frames"]
        else:
            frames = self.arrays["video_frames"][self.meta["indices"]]
            frames = frames[self.meta.get("order", range(len(frames)))]
        rows, columns = (
            np.minimum(np.arange(REFERENCE_PX, dtype=np.float32) * np.float32(side / REFERENCE_PX), side - 1).astype(
                int
            )
            for side in frames.shape[1:3]
        )
        return torch.from_numpy(np.ascontiguousarray(frames[:, rows][:, :, columns]))

    @cached_property
    def recipe(self) -> IndexRecipe:
        """The one in which the reference's outputs were made."""
        num_segments = self.meta["num_frames"] // self.meta["frames_per_group"]
        return IndexRecipe(
            name=self.folder.name,
            tower=self.tower.spec,
            sampling="uniform",
            num_segments=num_segments,
            frames_per_segment=self.meta["frames_per_group"],
            tokens_per_segment=len(self.arrays["local"]) // num_segments,
            num_global_layers=len(self.arrays["memory"]),
            merge_schedule=tuple(max(step, 0) for step in self.meta["r_list"]),
            resize="nearest",
            precision="float32",
        )

    @cached_property
    def encoded(self) -> Encoded:
        """What our tower makes of the frames."""
        return self.tower.encode(self.frames, self.recipe.feature_layer, self.recipe.num_global_layers)

    @cached_property
    def merging(self) -> Merging:
        """How the patches of that are merged, a segment a row."""
        patches = self.encoded.patches
        inputs = patches.reshape(self.recipe.num_segments, -1, patches.shape[-1])
        return Merging(inputs, self.recipe.merge_schedule)


@cache
def goldens() -> tuple[Golden, ...]:
    folders = sorted(path.parent for path in GOLDENS.glob("*/golden.json") if (path.parent / "full").is_dir())
    return tuple(golden for golden in map(Golden, folders) if "conversation" in golden.about)


@cache
def clips() -> tuple[Clip, ...]:
    return tuple(Clip(path.parent) for path in sorted(GOLDENS.glob("*/meta.json")) if (path.parent / "model").is_dir())


def golden_cases() -> list[object]:
    found = [(golden.folder.name, golden) for golden in goldens()]
    return parameters(found, GOLDENS, "LongVLM outputs")


def record_cases() -> list[object]:
    found = [
        (golden, index, about["key"]) for golden in goldens() for index, about in enumerate(golden.about["records"])
    ]
    named = [(f"{golden.folder.name}-{key}", Record(golden, index)) for golden, index, key in found]
    return parameters(named, GOLDENS, "LongVLM outputs")


def clip_cases(wanted: Callable[[Clip], object] = lambda _: True, what: str = "tower outputs") -> list[object]:
    found = [(clip.folder.name, clip) for clip in clips() if wanted(clip)]
    return parameters(found, GOLDENS, what)
