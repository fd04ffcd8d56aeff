"""What checkpoints of all families share: their tensors, end marks and chat templates, and what cannot be read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longvlm.pipeline.model_folder import read_json
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import Precision

GENERATION = "generation_config.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # as transformers' *ForCausalLM name them
NEEDED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LLAMA_FIELDS = (  # the fields of a config that decide what the language model computes
    *NEEDED_FIELDS,
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)


def end_marks(model: str, folder: Path, text_config: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, ascending: as a checkpoint generates, or else by its language model or tokenizer.

    Raises:
        InputError: none of them names any.
    """
    generation = read_json(folder, GENERATION) if (folder / GENERATION).is_file() else {}
    said = (generation.get("eos_token_id"), getattr(text_config, "eos_token_id", None), tokenizer.eos_token_id)
    eos: int | list[int] | None = next((one for one in said if one is not None), None)
    if eos is None:
        raise InputError(f"nothing in {model} says which token ends an answer; put eos_token_id in {GENERATION}.")
    return sorted(eos) if isinstance(eos, list) else [eos]


def placed(tensors: Mapping[str, Tensor], precision: Precision, device: str) -> dict[str, Tensor]:
    """Tensors in a precision on a device; what is one tensor under two names, as a tied head is, stays one."""
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        made.setdefault(id(tensor), tensor.to(device, getattr(torch, precision)))
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def refuse_quantised(model: str, config: Mapping[str, Any]) -> None:
    """InputError where a config.json says that the weights are quantised: what they stand for is not known here."""
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, Mapping) else "unknown"
        raise InputError(
            f"the weights of {model} are quantised ({kind}), and only plain ones can be read here; take the checkpoint "
            "in bfloat16 or float16 that they were made from."
        )


def check_tensors(model: str, expected: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> None:
    """InputError, naming up to five of each kind, unless `tensors` are exactly those expected, shape by name."""
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "lack": [name for name in expected if name not in found],
        "also hold": [name for name in found if name not in expected],
        "hold": [
            f"{name} as {found[name]} instead of {shape}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    if said := [f"{verb} {_few(names)}" for verb, names in problems.items() if names]:
        raise InputError(
            f"the weights of {model} do not fit its config.json: they {' and '.join(said)}; "
            "copy the checkpoint again, or correct config.json."
        )


def _few(names: list[str]) -> str:
    """Up to five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


def chat_template(model: str, folder: Path, tokenizer: Any) -> str:
    """The processor's template (chat_template.jinja, .json or in its config), or else the tokenizer's.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import ProcessorMixin  # takes seconds to load

    try:
        found = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template") or tokenizer.chat_template
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"the chat template of {model} cannot be read ({reason}); copy its file again.") from error
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        raise InputError(
            f"the model {model} has no chat template, so nothing says how to ask it; copy chat_template.jinja (or "
            ".json) there from where the model comes."
        )
    return found
