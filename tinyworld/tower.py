"""The tiny world's CLIP tower: trained on frames of real files, for indexing and search.

Two things are trained at once. The contrastive loss of CLIP (arXiv 2103.00020, section 2.3) ties frames to captions,
for `longvlm search`. And linear heads, dropped afterwards, are read off the hidden state that an index keeps, so that a
patch says what it belongs to and where that is. Their rows have unit length and features unit scale: what they read has
to lie in directions of like variance, since a language model learns little from a direction with a hundredth of it.

Shape letters: B frames of a batch, P patches, D channels, C classes.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, smooth_l1_loss
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from longvlm.pipeline.decode.video import close_video, decode, probe
from longvlm.schemas.recipe import METRIC_HEADS
from longvlm.tinyworld.questions import PLACE_ANSWERS, describe_frame
from longvlm.tinyworld.render import FPS, SIDE, Plane, pixel_masks
from longvlm.tinyworld.scenes import COLOURS, PLACES, SEGMENT_S, SHAPES, Scene, draw_scene
from longvlm.tinyworld.world import video_name

IMAGE_PX, PATCH_PX, DIM, LAYERS = 56, 8, 128, 5
GRID = IMAGE_PX // PATCH_PX
FEATURE_STATE = -2  # what an index keeps (LONGVLM.md section 3)
GROUND, SKY_BAND, HOUSE, OBJECT = range(4)  # what a patch belongs to
NUM_PLACES, NUM_COLOURS = len(PLACES), len(COLOURS)
FRAMES_PER_SEGMENT = 4
PER_SLOT = SEGMENT_S * FPS // FRAMES_PER_SEGMENT  # frames of a video for each that is looked at


def write_untrained(folder: Path, seed: int) -> None:
    """Write a CLIP folder with random weights, its vocabulary that of the world."""
    words = sorted({word for c in COLOURS for s in SHAPES for word in (c, s)} | {"a", "an"} | _place_words())
    special = [
        "<pad>",
        "<unk>",
        "<spare>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]  # an end mark of 2 is pooled in an old way
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))  # noqa: S106
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    marks = [(token, backend.token_to_id(token)) for token in special[-2:]]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[-2]} $A {special[-1]}", special_tokens=marks
    )
    named = {"pad_token": special[0], "unk_token": special[1], "bos_token": special[3], "eos_token": special[4]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **named)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": DIM, "intermediate_size": 3 * DIM, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**text, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 32},
        vision_config={**vision, "image_size": IMAGE_PX, "patch_size": PATCH_PX},
        projection_dim=64,
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": IMAGE_PX, "width": IMAGE_PX}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_PX}, crop_size=side).save_pretrained(folder)


def _place_words() -> set[str]:
    return {word for answer in PLACE_ANSWERS.values() for word in answer.split()}


@dataclass(frozen=True, eq=False)
class LabelledFrames:
    """Frames as an index decodes them, with their labels."""

    pixels: NDArray[np.uint8]  # [B, px, px, 3]
    kinds: NDArray[np.int64]  # [B, P]: GROUND, SKY_BAND, HOUSE or OBJECT
    thing: NDArray[np.int64]  # [B, 3]: colour, shape and place
    places: NDArray[np.float32]  # [B, 3]: the object's x, y and radius, each within about -2 and 2
    house: NDArray[np.float32]  # [B, 3]: the house's x and half width likewise, and 0
    texts: list[str]

    def take(self, rows: NDArray[np.int64]) -> "LabelledFrames":
        """Select some of the frames."""
        texts = [self.texts[row] for row in rows]
        seen = (self.pixels[rows], self.kinds[rows])
        return LabelledFrames(*seen, self.thing[rows], self.places[rows], self.house[rows], texts)


def read_labelled_frames(folder: Path, seed: int, num_videos: int) -> LabelledFrames:
    """The frames that an index of these videos would look at, with their labels."""
    pixels, labels = [], []
    for number in range(num_videos):
        scene = draw_scene(seed, number)
        pixels.append(decode_frames(folder / f"{video_name(seed, number)}.mp4"))
        times = (np.arange(len(pixels[-1])) * PER_SLOT + PER_SLOT // 2 + 0.5) / (SEGMENT_S * FPS)
        labels += [_frame_labels(scene, time) for time in times.tolist()]
    kinds, thing, places, house, texts = zip(*labels, strict=True)
    return LabelledFrames(
        np.concatenate(pixels), np.stack(kinds), np.stack(thing), np.stack(places), np.stack(house), [*texts]
    )


def decode_frames(path: Path) -> NDArray[np.uint8]:
    """The frames of a video that an index would look at, in the tower's size, [frames, px, px, 3]."""
    shown = list(range(PER_SLOT // 2, probe(str(path)).num_frames, PER_SLOT))
    frames = decode(str(path), shown, (IMAGE_PX, IMAGE_PX)).frames
    close_video()
    return frames


def _frame_labels(
    scene: Scene, segment: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], str]:
    object_HW, house_HW, sky_HW = pixel_masks(scene, segment)
    object_P, house_P, sky_P = (_by_patch(part) for part in (object_HW, house_HW, sky_HW))
    kinds_P = np.where(object_P > 0.25, OBJECT, np.where(house_P > 0.4, HOUSE, np.where(sky_P > 0.5, SKY_BAND, GROUND)))
    event = scene.event_at(int(segment))
    x, y, radius = event.at(segment)
    thing = np.array([COLOURS.index(event.colour), SHAPES.index(event.shape), PLACES.index(scene.place)])
    places = np.array([(x - 0.5) * 6, (y - 0.64) * 10, (radius - 0.15) * 25], np.float32)
    house_x, half = scene.house_at(segment)
    house = np.array([(house_x - 0.5) * 6, (half - 0.17) * 20, 0], np.float32)
    return kinds_P, thing, places, house, describe_frame(scene, segment)


def _by_patch(plane_HW: Plane) -> Plane:
    px = SIDE // GRID
    return plane_HW.reshape(GRID, px, GRID, px).mean(axis=(1, 3)).reshape(-1)


class AuxiliaryHeads(nn.Module):
    """Auxiliary heads: linear probes that are trained with the tower and dropped afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Parameter(torch.randn(4, DIM))
        self.colour = nn.Parameter(torch.randn(NUM_COLOURS, DIM))
        self.shape = nn.Parameter(torch.randn(len(SHAPES), DIM))
        self.place = nn.Parameter(torch.randn(NUM_PLACES, DIM))
        self.where = nn.Parameter(torch.randn(3, DIM))
        self.house = nn.Parameter(torch.randn(3, DIM))
        self.metric = nn.Parameter(torch.randn(NUM_COLOURS + 1 + NUM_PLACES * 2, DIM // METRIC_HEADS))
        self.bias = nn.ParameterDict({n: nn.Parameter(torch.zeros(c)) for n, c in (("where", 3), ("house", 3))})

    def forward(self, patches_BPD: Tensor, batch: LabelledFrames) -> dict[str, Tensor]:
        """A loss for each head."""
        unit_BPD = patches_BPD * (DIM**0.5 / patches_BPD.norm(dim=-1, keepdim=True))
        kinds = torch.from_numpy(batch.kinds)
        thing = torch.from_numpy(batch.thing)[:, None].expand(-1, kinds.shape[1], -1)
        is_object, is_house = kinds == OBJECT, kinds == HOUSE
        seen, houses = unit_BPD[is_object], unit_BPD[is_house]
        where = torch.from_numpy(batch.places)[:, None].expand(-1, kinds.shape[1], -1)
        house = torch.from_numpy(batch.house)[:, None].expand(-1, kinds.shape[1], -1)
        ground = torch.where(kinds == SKY_BAND, NUM_PLACES, 0) + thing[..., 2] + NUM_COLOURS + 1
        group = torch.where(is_object, thing[..., 0], torch.where(is_house, NUM_COLOURS, ground))
        metric_BPC = unit_BPD.unflatten(-1, (METRIC_HEADS, -1)).mean(dim=2)
        return {
            "kind": cross_entropy(self._read("kind", unit_BPD).flatten(0, 1), kinds.flatten()),
            "colour": cross_entropy(self._read("colour", seen), thing[is_object][:, 0]),
            "shape": cross_entropy(self._read("shape", seen), thing[is_object][:, 1]),
            "place": cross_entropy(self._read("place", unit_BPD[~is_object]), thing[~is_object][:, 2]),
            "where": smooth_l1_loss(self._read("where", seen) + self.bias["where"], where[is_object]),
            "house": smooth_l1_loss(self._read("house", houses) + self.bias["house"], house[is_house]),
            "metric": cross_entropy(
                8 * (normalize(metric_BPC, dim=-1) @ normalize(self.metric, dim=-1).T).flatten(0, 1), group.flatten()
            ),
        }

    def _read(self, name: str, unit: Tensor) -> Tensor:
        return unit @ normalize(getattr(self, name), dim=-1).T


LOSS_WEIGHTS = {
    "kind": 0.5,
    "colour": 1.0,
    "shape": 1.5,
    "place": 0.3,
    "where": 2.0,
    "house": 1.0,
    "metric": 0.7,
    "clip": 0.3,
}


def train_tower(
    folder: Path, videos: Path, *, num_videos: int, steps: int, seed: int = 0, batch_frames: int = 64
) -> None:
    """Train the CLIP in a folder on the videos of a seed, in place; prints a JSON line every 50 steps."""
    model = CLIPModel.from_pretrained(folder, attn_implementation="sdpa")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    frames = read_labelled_frames(videos, seed, num_videos)
    torch.manual_seed(seed)
    heads = AuxiliaryHeads()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *heads.parameters()], lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    order = np.random.default_rng(seed)
    started = time.perf_counter()
    for step in range(steps):
        batch = frames.take(order.choice(len(frames.texts), batch_frames, replace=False))
        pixels = (torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
        vision = model.vision_model(pixel_values=pixels, output_hidden_states=True)
        losses = heads(vision.hidden_states[FEATURE_STATE][:, 1:], batch)
        losses["clip"] = _contrastive(model, vision.pooler_output, tokenizer, batch.texts)
        loss = sum(LOSS_WEIGHTS[name] * part for name, part in losses.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            shown = {name: round(part.item(), 4) for name, part in losses.items()}
            click.echo(json.dumps({"step": step, "s": round(time.perf_counter() - started, 1), **shown}))
    model.save_pretrained(folder)


def _contrastive(model: CLIPModel, pooled: Tensor, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """CLIP's loss, over the different texts of a batch: frames of one text are not held against each other."""
    unique = list(dict.fromkeys(texts))
    target = torch.tensor([unique.index(text) for text in texts])
    words = tokenizer(unique, padding=True, return_tensors="pt")
    text = model.text_model(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).pooler_output
    text_TE = normalize(model.text_projection(text), dim=-1)
    frames_BE = normalize(model.visual_projection(pooled), dim=-1)
    logits_BT = model.logit_scale.exp().clamp(max=100) * frames_BE @ text_TE.T
    first = torch.tensor([texts.index(text) for text in unique])
    return (cross_entropy(logits_BT, target) + cross_entropy(logits_BT[first].T, torch.arange(len(unique)))) / 2
