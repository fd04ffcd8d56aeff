"""Text encoders of CLIP and SigLIP towers: texts to search embeddings.

Shape letters: N texts, D channels, E search channels.
"""

# ruff: noqa: N806 - tensors are named by their shape

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longvlm.pipeline.model_folder import load_tokenizer, read_json, resolve
from longvlm.pipeline.weights import build_module, read_tensors
from longvlm.schemas.errors import InputError

_FAMILIES = ("clip", "siglip")
_NO_SPECIAL_IDS = {"siglip": {"bos_token_id": None, "eos_token_id": None}}  # its defaults lie outside its vocabulary
_TEXT_PROJECTION = "text_projection.weight"


class TextEncoder:
    """A loaded text encoder. Make one with `load_text_encoder`."""

    def __init__(self, model: Any, tokenizer: Any, projection: Tensor | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._projection_ED = projection

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Tensor:
        """Embed texts: float32 [N, E], L2-normalised, beside the search embeddings of the same model's tower.

        Texts longer than the encoder takes (77 tokens for CLIP, 64 for SigLIP) are cut.
        """
        ids = self._tokenizer(
            texts,
            padding="max_length" if self._projection_ED is None else True,  # SigLIP was trained on padded texts
            truncation=True,
            max_length=self._model.config.max_position_embeddings,
            return_tensors="pt",
        ).input_ids
        pooled_ND = self._model(input_ids=ids).pooler_output
        return normalize(pooled_ND if self._projection_ED is None else pooled_ND @ self._projection_ED.T, dim=-1)


def load_text_encoder(model: str) -> TextEncoder:
    """Load the text encoder that belongs to a tower, for search; runs on the CPU in float32.

    Raises:
        InputError: the model has no text part, or lacks a file of it.
    """
    folder = resolve(model)
    raw = read_json(folder, "config.json")
    kind = raw.get("model_type")
    if kind not in _FAMILIES:
        raise InputError(
            f"{model} has no text encoder, and searching by text needs one; index with a whole CLIPModel or "
            "SiglipModel, such as openai/clip-vit-large-patch14."
        )
    import transformers  # takes seconds to load

    config_class, model_class = {
        "clip": (transformers.CLIPTextConfig, transformers.CLIPTextModel),
        "siglip": (transformers.SiglipTextConfig, transformers.SiglipTextModel),
    }[kind]
    config = config_class(**{**_NO_SPECIAL_IDS.get(kind, {}), **(raw.get("text_config") or {})})

    def rename(name: str) -> str | None:
        inner = name.removeprefix("text_model.")
        return None if inner == "embeddings.position_ids" or inner == name != _TEXT_PROJECTION else inner

    tensors = {name: tensor.float() for name, tensor in read_tensors(folder, rename)}
    projection = tensors.pop(_TEXT_PROJECTION, None)
    tokenizer = load_tokenizer(folder)
    return TextEncoder(build_module(model_class, config, tensors, model), tokenizer, projection)
