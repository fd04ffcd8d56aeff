"""A checkpoint of transformers' LLaVA family on disk: what its config says, and the tensors that answering needs."""

from __future__ import annotations  # torch, which takes seconds to load, stands in annotations alone

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.models.checkpoints import check_tensors, end_marks, is_tied, refuse_quantised, tie
from longvlm.pipeline.models.llava.chat import ChatTemplate, load_chat_template
from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

NEWLINE, PROJECTOR = "image_newline", "multi_modal_projector."
_LANGUAGE_MODELS = ("llama", "mistral", "qwen2")  # that `modules` knows
_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}  # towers that videos can be indexed with
_INNER = re.compile(r"^(?:model\.)?(language_model|vision_tower|multi_modal_projector|image_newline)(?:\.|$)")


@dataclass(frozen=True)
class Family:
    """What tells one family from another."""

    config: str  # its class in transformers
    modality: Literal["image", "video"]


FAMILIES = {
    "llava": Family("LlavaConfig", "image"),
    "llava_next_video": Family("LlavaNextVideoConfig", "video"),
    "llava_onevision": Family("LlavaOnevisionConfig", "video"),
}


@dataclass(frozen=True, eq=False)
class LlavaCheckpoint:
    """A checkpoint whose config was found to be one that can be answered with."""

    name: str  # as the user named it
    folder: Path
    config: Any  # transformers' own, text_config and vision_config inside

    @property
    def family(self) -> Family:
        """By the config's model type."""
        return FAMILIES[self.config.model_type]

    @property
    def sight(self) -> Sight:
        """Its own tower, of which no CLS is read."""
        return Sight(self.name, int(self.config.vision_feature_layer), num_global_tokens=0)

    def tensors(self) -> dict[str, Tensor]:
        """Projector and language model by name, mapped rather than read, of either layout of keys.

        Language model tensors have their names in transformers' *ForCausalLM; tied ones are one.
        """
        from longvlm.pipeline.weights import read_tensors

        tensors = dict(read_tensors(self.folder, _rename))
        if is_tied(self.config):
            tie(tensors)
        if self.config.model_type == "llava_next_video":
            tensors.pop(NEWLINE, None)  # ends the rows of still images only
        return tensors

    def modules(self) -> tuple[Any, nn.Module]:
        """Language model and projector, without weights."""
        import torch

        from longvlm.pipeline.models.llava.modules import build_modules  # takes seconds to load

        with torch.device("meta"):
            return build_modules(self.config)

    def chat(self) -> ChatTemplate:
        """How it is asked."""
        image = self.config.image_token_id
        video = getattr(self.config, "video_token_id", image)
        place = image if self.family.modality == "image" else video
        return load_chat_template(self.name, self.folder, self.family.modality, place, frozenset({image, video}))

    def check(self, tensors: dict[str, Tensor], chat: ChatTemplate) -> None:
        """InputError unless the files hold exactly the tensors that the config asks for, placeholders among them."""
        llm, projector = self.modules()
        expected = {name: list(tensor.shape) for name, tensor in llm.state_dict().items()}
        expected |= {f"{PROJECTOR}{name}": list(tensor.shape) for name, tensor in projector.state_dict().items()}
        text = self.config.text_config
        if self.config.model_type == "llava_onevision":
            expected[NEWLINE] = [text.hidden_size]
        check_tensors(self.name, expected, tensors)
        if max(chat.marks) >= text.vocab_size:
            raise InputError(
                f"config.json of {self.name} gives the video's place the token {max(chat.marks)}, but its language "
                f"model has {text.vocab_size} tokens; correct image_token_index and video_token_index there."
            )

    def eos_ids(self, chat: ChatTemplate) -> tuple[int, ...]:
        """Tokens that end an answer: as the checkpoint generates, or else by its language model or tokenizer.

        Raises:
            InputError: none of them names any.
        """
        return end_marks(self.name, self.folder, self.config.text_config, chat.tokenizer)


def find_llava(model: str) -> LlavaCheckpoint:
    """A checkpoint by its config.json alone.

    Raises:
        InputError: it is none of the family, or of a kind whose tokens cannot be stored or read here.
    """
    import transformers  # takes seconds to load
    from huggingface_hub.errors import StrictDataclassError

    folder = resolve(model)
    raw = read_json(folder, "config.json")
    try:
        config = getattr(transformers, FAMILIES[raw["model_type"]].config)(**raw)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).replace("\n", " ").strip().rstrip(".")
        raise InputError(f"config.json of {model} describes no LLaVA ({reason}); correct it.") from error
    refuse_quantised(model, raw)
    _check_vision(model, config)
    _check_text(model, config.text_config)
    return LlavaCheckpoint(model, folder, config)


def _rename(name: str) -> str | None:
    """A tensor's name among those of language model and projector; None for the tower's and for counted buffers.

    Files of transformers before 4.52 call the language model `language_model.model`, later ones
    `model.language_model`.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return None
    inner = _INNER.match(name)
    if inner is None or inner[1] in ("multi_modal_projector", "image_newline"):
        return name[inner.start(1) :] if inner else name
    if inner[1] == "vision_tower":
        return None
    rest = name[inner.end() :]
    return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"


def _check_vision(model: str, config: Any) -> None:
    kind, layer = config.vision_config.model_type, config.vision_feature_layer
    if kind not in _HAS_CLS:
        raise InputError(f"the tower of {model} is of type {kind}, and videos are indexed with CLIP or SigLIP towers.")
    if not isinstance(layer, int):
        raise InputError(
            f"the projector of {model} reads {len(layer)} layers of its tower side by side ({layer}), but tokens of "
            "one layer are stored; choose a model with a single vision_feature_layer."
        )
    strategy, fitting = config.vision_feature_select_strategy, "default" if _HAS_CLS[kind] else "full"
    if strategy != fitting:
        fault = "its projector reads CLS as one more patch" if _HAS_CLS[kind] else "it drops a patch where CLS would be"
        raise InputError(
            f"the model {model} selects features by the strategy {strategy!r}: with a tower of type {kind} {fault}, "
            f"and only patches are stored, all of them; choose a model with the strategy {fitting!r}."
        )
    if getattr(config, "spatial_pool_mode", "average") not in ("average", "max"):
        raise InputError(
            f"the model {model} pools frames by {config.spatial_pool_mode!r}; choose one that pools by average or max."
        )


def _check_text(model: str, text: Any) -> None:
    if text.model_type not in _LANGUAGE_MODELS:
        raise InputError(
            f"the language model of {model} is of type {text.model_type}, which cannot be answered with; choose a "
            f"model over {', '.join(_LANGUAGE_MODELS)}."
        )
    window = getattr(text, "sliding_window", None)
    if window is not None and window < text.max_position_embeddings:
        raise InputError(
            f"the language model of {model} attends to the last {window} tokens of its {text.max_position_embeddings}, "
            "and answering over a shared prefix needs all of them; choose a model without a sliding window."
        )
