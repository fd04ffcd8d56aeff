"""Transformers' LLaVA family: its projector and language model when answering, over tokens of its own tower.

What is stored is always the tower's plain patch tokens before the projector. Frames that nothing was merged of are
pooled exactly as transformers pools a video's; merged tokens lie on no grid, so they are projected as they are.

Shape letters: M rows of a prefix after projection, F frames, P patches of a frame, C tower channels, D model width.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoPooler

from longvlm.pipeline.models.checkpoints import EMBED, HEAD, LLAMA_FIELDS, asked_decoding, placed
from longvlm.pipeline.models.contract import Extent, ModelSpec, Prompt, VideoRows, Vocabulary
from longvlm.pipeline.models.llava.chat import NAME, ChatTemplate
from longvlm.pipeline.models.llava.checkpoint import NEWLINE, PROJECTOR, find_llava
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.transfer import to_device
from longvlm.pipeline.weights import weights_fingerprint
from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import fingerprint
from longvlm.schemas.recipe import Precision


@dataclass(frozen=True, eq=False)
class Llava:
    """A loaded model, ready to project prefixes and to be decoded from."""

    name: str
    llm: Any
    projector: Any
    pooler: Any  # or None; LLaVA-NeXT-Video: halves each frame's grid before projection
    halves_after: bool  # LLaVA-OneVision: halves it after projection
    newline: Tensor | None  # [D], LLaVA-OneVision: ends the video
    chat: ChatTemplate
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]  # placeholders, and rows of the head that no token belongs to

    mark_ids = ()  # none is new with its projector

    @property
    def option_temperature(self) -> float:
        """None that is known."""
        return 1.0

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return int(self.llm.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self.projector.linear_1.weight.device
        return device

    @property
    def mm_hidden_size(self) -> int:
        """Width of a visual token before projection."""
        return int(self.projector.linear_1.in_features)

    @property
    def vocabulary(self) -> Vocabulary:
        """What its answers are spelt in."""
        return Vocabulary(self.chat.tokenizer.backend_tokenizer, self.eos_ids)

    @property
    def templates(self) -> tuple[str, ...]:
        """Its own."""
        return (NAME,)

    def read(self, prefix: VideoPrefix) -> VideoRows:
        """A video's rows; whole frames are pooled as the family does.

        Its prefixes have no global tokens, and its prompts no time markers.
        """
        weight = self.projector.linear_1.weight
        rows = to_device(prefix.rows, weight.device).to(weight.dtype)
        if prefix.num_whole_frames is not None:
            frames_FPC = rows.reshape(prefix.num_whole_frames, -1, rows.shape[1])
            if self.pooler is not None:
                frames_FPC = self.pooler(frames_FPC)
            frames_FPD = self.projector(frames_FPC)
            rows = (_halved(frames_FPD) if self.halves_after else frames_FPD).flatten(0, 1)
        else:
            rows = self.projector(rows)
        return VideoRows(rows if self.newline is None else torch.cat([rows, self.newline[None]]))

    def extent(self, prefix: VideoPrefix) -> Extent:
        """Fewer rows than there are where frames are pooled; a line break more where one ends the video."""
        num_rows, num_frames = len(prefix.rows), prefix.num_whole_frames
        if num_frames is not None and (self.pooler is not None or self.halves_after):
            side = math.isqrt(num_rows // num_frames)
            pooled = math.ceil(side / 2) if self.pooler is None else side // self.pooler.pool.stride
            num_rows = num_frames * pooled**2
        num_rows += self.newline is not None
        return Extent(num_rows, num_rows)

    def fold(self, seen_M: Tensor, prefix: VideoPrefix) -> Tensor:
        """What pooled patches drew is spread over those of their frame; what the closing line break drew is dropped."""
        num_rows, num_frames = len(prefix.rows), prefix.num_whole_frames
        if num_frames is None:
            return seen_M[:num_rows]
        per_frame, num_patches = len(seen_M) // num_frames, num_rows // num_frames
        by_frame = seen_M[: per_frame * num_frames].view(num_frames, per_frame).sum(dim=1)
        return (by_frame / num_patches).repeat_interleave(num_patches)

    def num_text_rows(self, start_s: float, end_s: float) -> int:  # noqa: ARG002 - there are none
        """None."""
        return 0

    def caption_row(self, prefix: VideoPrefix, at_s: float) -> int:  # noqa: ARG002 - there are none
        """Its prompts have no time markers; InputError."""
        raise InputError("it is a timed caption, and prompts of this model have no time markers to learn it at.")

    def lay_out(self, question: str, num_visual_tokens: int, template: str, *, may_think: bool = False) -> Prompt:
        """See `ChatTemplate.lay_out`."""
        return self.chat.lay_out(question, num_visual_tokens, template, may_think=may_think)

    def turn_ids(self, question: str, template: str) -> tuple[int, ...]:  # noqa: ARG002 - there are none
        """Its template lays out one question; InputError."""
        raise InputError(f"{self.name} is asked by its chat template, one question at a time; split the conversation.")

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """See `ChatTemplate.option_ids`."""
        return self.chat.option_ids(options)

    def decode(self, ids: Iterable[int]) -> str:
        """See `ChatTemplate.decode`."""
        return self.chat.decode(ids)


def describe_llava(model: str) -> ModelSpec:
    """What a checkpoint is, without building the model; its weights are only mapped and hashed.

    Raises:
        InputError: the checkpoint lacks something, or its parts do not fit together.
    """
    checkpoint = find_llava(model)
    config, tensors, chat = checkpoint.config, checkpoint.tensors(), checkpoint.chat()
    checkpoint.check(tensors, chat)
    text, vision = config.text_config, config.vision_config
    decisive = {
        "tensors": weights_fingerprint(tensors.items()),
        "tokenizer": chat.tokenizer.backend_tokenizer.to_str(),
        "template": chat.template,
        "text": {"model_type": text.model_type, **{name: getattr(text, name, None) for name in LLAMA_FIELDS}},
        "family": config.model_type,
        "activation": config.projector_hidden_act,
        "places": [chat.place, sorted(chat.marks)],
        "pooling": [getattr(config, f"spatial_pool_{name}", None) for name in ("mode", "stride")],
        "eos": checkpoint.eos_ids(chat),
    }
    return ModelSpec(
        name=model,
        sight=checkpoint.sight,
        weights=fingerprint(decisive),
        mm_hidden_size=vision.hidden_size,
        context=text.max_position_embeddings,
        templates=(NAME,),
        family=config.model_type,
        vocabulary=Vocabulary(chat.tokenizer.backend_tokenizer, checkpoint.eos_ids(chat)),
        asked_decoding=asked_decoding(checkpoint.folder),
    )


def load_llava(model: str, precision: Precision = "float32", device: str = "cpu") -> Llava:
    """Projector and language model of a checkpoint on a device; its tower is not loaded.

    Raises:
        InputError: as `describe_llava`.
    """
    checkpoint = find_llava(model)
    config, tensors, chat = checkpoint.config, checkpoint.tensors(), checkpoint.chat()
    checkpoint.check(tensors, chat)
    weights = placed(tensors, precision, device)
    llm, projector = checkpoint.modules()
    newline_D = weights.pop(NEWLINE, None)
    projector.load_state_dict({name: weights.pop(f"{PROJECTOR}{name}") for name in projector.state_dict()}, assign=True)
    llm.load_state_dict(weights, assign=True)
    if tensors[HEAD] is tensors[EMBED]:
        llm.lm_head.weight = llm.get_input_embeddings().weight  # one parameter, for training too
    with torch.device(device):
        llm.model.rotary_emb = type(llm.model.rotary_emb)(config.text_config)  # its buffers stand in no file
    return Llava(
        name=model,
        llm=llm.eval().requires_grad_(requires_grad=False),
        projector=projector.eval().requires_grad_(requires_grad=False),
        pooler=LlavaNextVideoPooler(config) if config.model_type == "llava_next_video" else None,
        halves_after=config.model_type == "llava_onevision",
        newline=newline_D,
        chat=chat,
        eos_ids=checkpoint.eos_ids(chat),
        banned_ids=(*sorted(chat.marks), *range(chat.num_ids, config.text_config.vocab_size)),
    )


def _halved(frames_FPD: Tensor) -> Tensor:
    """Each frame's patches on a grid of half the side, rounded up, bilinear, as LlavaOnevisionModel.apply_pooling."""
    side = math.isqrt(frames_FPD.shape[1])
    grid = frames_FPD.reshape(len(frames_FPD), side, side, -1).permute(0, 3, 1, 2)
    half = math.ceil(side / 2)
    return nn.functional.interpolate(grid, size=(half, half), mode="bilinear").flatten(2).transpose(1, 2)
