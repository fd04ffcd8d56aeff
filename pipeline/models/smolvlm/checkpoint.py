"""A SmolVLM2 checkpoint on disk: what its config says, and the tensors and words that answering needs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import SmolVLMConfig

from longvlm.pipeline.model_folder import load_tokenizer, read_json, read_tensors, resolve
from longvlm.pipeline.models.checkpoints import HEAD, is_tied, refuse_quantised, tie
from longvlm.pipeline.models.prefix import Sight
from longvlm.pipeline.models.timed_prompt import TimedPrompt
from longvlm.schemas.errors import InputError

MODEL_TYPE = "smolvlm"
# A frame's words and marks, a token a byte: `\nFrame from 1000:00:` and three marks.
FRAME_TOKENS = 24
# What transformers asks about videos with, whatever template the checkpoint has for stills.
BEFORE, AFTER = "<|im_start|>User: ", "\n\n{question}<end_of_utterance>\nAssistant:"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
_TEXT_PREFIX = re.compile(r"^(?:model\.)?text_model\.(?:model\.)?")


@dataclass(frozen=True, eq=False)
class SmolCheckpoint:
    """A checkpoint whose config was found to be one that can be answered with."""

    name: str  # as the user named it
    folder: Path
    config: Any  # transformers' own, text_config and vision_config inside

    @property
    def sight(self) -> Sight:
        """Its own tower."""
        return Sight(self.name, -1, num_global_tokens=0, num_marker_tokens=FRAME_TOKENS, marks_pictures=True)

    def tensors(self) -> dict[str, Tensor]:
        """The language model's tensors by their names in transformers' *ForCausalLM, mapped; tied ones are one."""
        tensors = dict(read_tensors(self.folder, _rename))
        if is_tied(self.config):
            tie(tensors)
        return tensors

    def prompt(self) -> TimedPrompt:
        """How it is asked about a video.

        Raises:
            InputError: the tokenizer is missing or damaged, or lacks a mark.
        """
        tokenizer = load_tokenizer(self.folder)
        if lacking := [mark for mark in (FAKE, GLOBAL, IMAGE) if mark not in tokenizer.get_vocab()]:
            raise InputError(f"the tokenizer of {self.name} lacks {', '.join(lacking)}; copy its files again.")
        place = self.config.image_token_id

        def split(question: str) -> tuple[str, str]:
            return BEFORE, AFTER.replace("{question}", question)

        return TimedPrompt(self.name, tokenizer, split, place, frozenset({place}))


def find_smol(model: str) -> SmolCheckpoint:
    """A checkpoint by its config.json alone.

    Raises:
        InputError: it is none of the family, its language model is no LLaMA, or its weights are quantised.
    """
    folder = resolve(model)
    raw = read_json(folder, "config.json")
    refuse_quantised(model, raw)
    try:
        config = SmolVLMConfig.from_dict(raw)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).replace("\n", " ").strip().rstrip(".")
        raise InputError(f"config.json of {model} describes no SmolVLM ({reason}); correct it.") from error
    if config.text_config.model_type != "llama":
        raise InputError(
            f"the language model of {model} is of type {config.text_config.model_type}, which cannot be answered with; "
            "choose a SmolVLM2 over a LLaMA."
        )
    return SmolCheckpoint(model, folder, config)


def _rename(name: str) -> str | None:
    """A tensor's name among those of the language model; None for the tower's, and for counted buffers."""
    if name == HEAD:
        return name
    inner = _TEXT_PREFIX.match(name)
    if inner is None or name.endswith("rotary_emb.inv_freq"):
        return None
    return f"model.{name[inner.end() :]}"
