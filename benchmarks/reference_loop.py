"""The baseline of `benchmarks.index`: one process that does, file by file, what the reference does (LONGVLM.md).

decord at full size, nearest resize to 224 px, PIL, CLIP's processor, the tower with all hidden states, the plain merge,
and two pickles a video.
"""

import pickle
import time
from pathlib import Path
from typing import Any

import decord
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from benchmarks.merge import merge_plainly
from longvlm.pipeline.decode.sampling import uniform_indices

NUM_FRAMES, SEGMENTS, KEPT, GLOBAL_LAYERS, SIDE = 100, 10, 30, 5, 224


def index_plainly(files: list[Path], tower_folder: Path, out: Path, threads: int) -> float:
    """Index all files; returns the seconds from the first decode to the last pickle."""
    torch.set_num_threads(threads)
    processor = CLIPImageProcessorPil.from_pretrained(tower_folder)
    tower = CLIPVisionModel.from_pretrained(tower_folder).eval()
    started = time.perf_counter()
    for file in files:
        local, memory = _features(_frames(file, threads), processor, tower)
        for name, array in (("local", local), ("memory", memory)):
            with (out / f"{file.stem}.{name}.pkl").open("wb") as sink:
                pickle.dump(array, sink)
    return time.perf_counter() - started


def _frames(file: Path, threads: int) -> list[Image.Image]:
    reader = decord.VideoReader(str(file), ctx=decord.cpu(0), num_threads=threads)
    indices = uniform_indices(len(reader), NUM_FRAMES)
    frames = reader.get_batch(indices).asnumpy()
    if frames.shape[1:3] != (SIDE, SIDE):
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        frames = interpolate(pixels, size=(SIDE, SIDE)).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    if len(frames) < NUM_FRAMES:
        scale = np.float32(len(frames) / NUM_FRAMES)
        frames = frames[np.floor(np.arange(NUM_FRAMES, dtype=np.float32) * scale).astype(int)]
    return [Image.fromarray(frame) for frame in frames]


@torch.inference_mode()
def _features(frames: list[Image.Image], processor: Any, tower: Any) -> tuple[np.ndarray, np.ndarray]:
    pixels = processor(images=frames, return_tensors="pt")["pixel_values"]
    hidden = tower(pixels, output_hidden_states=True).hidden_states
    patches = hidden[-2][:, 1:]
    tokens = patches.reshape(SEGMENTS, -1, patches.shape[-1])
    local, _ = merge_plainly(tokens, _schedule(tokens.shape[1]))
    memory = torch.stack([state[:, 0] for state in hidden], dim=1).mean(dim=0)[-GLOBAL_LAYERS:]
    return local.flatten(0, 1).half().numpy(), memory.half().numpy()


def _schedule(num_tokens: int) -> tuple[int, ...]:
    from longvlm.schemas.recipe import halving_schedule

    return halving_schedule(num_tokens, KEPT)
