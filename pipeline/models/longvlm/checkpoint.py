"""A LongVLM checkpoint on disk: which files make up the model, what its config says, and the tensors they hold."""

from __future__ import annotations  # torch, which takes seconds to load, stands in annotations alone

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tokenizers import Tokenizer

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.models.checkpoints import EMBED, HEAD, LLAMA_FIELDS, NEEDED_FIELDS, tie, token_ids
from longvlm.pipeline.models.prompt import MAX_MARKER_TOKENS, TEMPLATES, PromptLayout, template
from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("LongVLM", "llama", "llava")  # model types whose config carries LLaMA's fields at its top level
NUM_GLOBAL_TOKENS = 5  # LONGVLM.md section 1: memory rows used
FEATURE_LAYER = -2  # LONGVLM.md section 3: the hidden state whose patches it reads
OPTION_TEMPERATURE = "mm_option_temperature"  # in a config: measured of these weights, so that no others keep it
PROJECTORS = ("mm_projector.safetensors", "mm_projector.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Checkpoint:
    """What makes up a LongVLM: a folder with config, weights and tokenizer, and maybe a projector file apart."""

    name: str  # as the user named it
    folder: Path
    config: dict[str, Any]
    projector: Path | None  # overrides what the folder's weights hold of the projector and the embeddings
    tokenizer: Path

    @property
    def llama(self) -> dict[str, Any]:
        """The config's fields that belong to the language model."""
        return {name: self.config[name] for name in LLAMA_FIELDS if self.config.get(name) is not None}

    @property
    def use_start_end(self) -> bool:
        """Whether the video stands between `<vid_start>` and `<vid_end>` in the prompt."""
        return bool(self.config.get("mm_use_vid_start_end", True))

    @property
    def layout(self) -> PromptLayout:
        """What else stands among a video's rows in the prompt; nothing where the config does not say.

        Raises:
            InputError: it says something else than there is.
        """
        named: PromptLayout = self.config.get("mm_prompt_layout", "plain")
        if named not in get_args(PromptLayout):
            raise InputError(
                f"config.json of {self.name} asks for the prompt layout {named!r}; set mm_prompt_layout there to one "
                f"of {', '.join(get_args(PromptLayout))}."
            )
        return named

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompt templates, the one that it was trained with first: the reference's where the config does not say.

        Raises:
            InputError: it names one that there is not.
        """
        first = self.config.get("mm_prompt_template", next(iter(TEMPLATES)))
        template(first)
        return (first, *(name for name in TEMPLATES if name != first))

    @property
    def option_temperature(self) -> float:
        """What the log-likelihoods of options are divided by before they become shares; 1 where the config has none.

        Raises:
            InputError: it has one that is no positive number.
        """
        named = self.config.get(OPTION_TEMPERATURE, 1.0)
        if isinstance(named, bool) or not isinstance(named, int | float) or not 0 < named < inf:
            raise InputError(
                f"config.json of {self.name} has the {OPTION_TEMPERATURE} {named!r}; it must be a positive number."
            )
        return float(named)

    @property
    def tower(self) -> str:
        """The vision tower that the config names: a folder, absolute or from the checkpoint's own, or a hub id.

        Raises:
            InputError: it names none, or a folder that does not exist.
        """
        named = self.config.get("mm_vision_tower")
        if not isinstance(named, str) or not named:
            raise InputError(
                f"config.json of {self.name} does not name its vision tower; add for example "
                '"mm_vision_tower": "openai/clip-vit-large-patch14".'
            )
        if (self.folder / named).is_dir():  # an absolute path stays itself
            return str(self.folder / named)
        if Path(named).is_absolute() or named.startswith("."):
            raise InputError(
                f"the vision tower {named}, which config.json of {self.name} names, does not exist; "
                "correct mm_vision_tower there."
            )
        return named

    def eos_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Tokens that end an answer, LLaMA's 2 where the config does not say.

        Raises:
            InputError: it names something else, or no token that there is.
        """
        known = set(tokenizer.get_vocab().values())
        eos = self.config.get("eos_token_id", 2)
        found = tuple(i for i in token_ids(self.name, "config.json", eos) if i in known)
        if not found:
            raise InputError(
                f"config.json of {self.name} has the eos_token_id {eos!r}, which is no token of its tokenizer; correct "
                "it."
            )
        return found

    @property
    def sight(self) -> Sight:
        """What it sees a video through. Raises InputError as `tower` and `layout` do."""
        num_marker_tokens = MAX_MARKER_TOKENS if self.layout == "time_markers" else 0
        return Sight(self.tower, FEATURE_LAYER, NUM_GLOBAL_TOKENS, num_marker_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the folder's weights by name, mapped rather than read.

        A tied head is left out, as LLaMA's old `inv_freq` is.
        """
        from longvlm.pipeline.weights import read_tensors

        tensors = dict(read_tensors(self.folder, lambda name: None if name.endswith("rotary_emb.inv_freq") else name))
        if self.config.get("tie_word_embeddings"):
            tie(tensors)
            if tensors.get(HEAD) is tensors.get(EMBED):
                tensors.pop(HEAD, None)
        return tensors

    def projector_tensors(self) -> dict[str, Tensor]:
        """The tensors of the projector file by name; none where there is no such file.

        Raises:
            InputError: the file is damaged, or holds anything but tensors (pickles are never trusted).
        """
        if self.projector is None:
            return {}
        import torch
        from safetensors.torch import load_file

        try:
            if self.projector.suffix == ".safetensors":
                return load_file(self.projector)
            return dict(torch.load(self.projector, map_location="cpu", weights_only=True))
        except Exception as error:  # the readers share no class of error
            raise InputError(
                f"the projector {self.projector} cannot be read ({str(error).splitlines()[0]}); copy the file again."
            ) from error


def find_checkpoint(model: str, projector: str | None = None) -> Checkpoint:
    """The parts of a model in the reference's layout (LONGVLM.md section 5).

    Args:
        model: a folder or hub id: a consolidated checkpoint, or base LLaMA weights with `mm_projector.*` beside them
            or named by `projector`.
        projector: a projector file as training saves it, in place of the folder's own.

    Raises:
        InputError: something is missing, or this is no language model.
    """
    folder = resolve(model)
    config = read_json(folder, "config.json")
    _check_config(model, config)
    if projector is not None and not Path(projector).is_file():
        raise InputError(f"the projector {projector} does not exist; name an mm_projector.bin or .safetensors file.")
    tokenizer = _first(folder, TOKENIZERS)
    if tokenizer is None:
        raise InputError(
            f"the model folder {model} lacks tokenizer.json (or sentencepiece's tokenizer.model); copy it there from "
            "where the model comes."
        )
    apart = Path(projector) if projector is not None else _first(folder, PROJECTORS)
    return Checkpoint(model, folder, config, apart, tokenizer)


def _check_config(model: str, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if str(kind).startswith(("clip", "siglip")):  # clip, clip_vision_model, siglip2_vision_model, ...
        raise InputError(
            f"the model {model} is a vision tower ({kind}): it can index videos, but answering needs a LongVLM or "
            "LLaVA checkpoint; name one with --model."
        )
    if kind not in FAMILIES:
        raise InputError(
            f"the model {model} is of type {kind}, not a LongVLM or LLaVA checkpoint; name one with --model."
        )
    if lacking := [name for name in NEEDED_FIELDS if not isinstance(config.get(name), int)]:
        raise InputError(
            f"config.json of {model} lacks {', '.join(lacking)}; a LongVLM's config carries LLaMA's fields itself."
        )


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of some files that a folder holds."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
