"""What checkpoints of all families share: their tensors, end marks and chat templates, and what cannot be read."""

from __future__ import annotations  # torch, which takes seconds to load, stands in annotations alone

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvlm.pipeline.model_folder import read_json
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import Precision

if TYPE_CHECKING:
    from torch import Tensor

# As some files call the parts of a model, by what transformers calls them.
_OLDER_NAMES = {r"^(visual|language_model)\.(?!model\.|lm_head)": r"model.\1."}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in transformers' *ForCausalLM
GENERATION = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "no_repeat_ngram_size": 0}  # that change nothing
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


def end_marks(model: str, folder: Path, text_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: as a checkpoint generates, or else by its language model or tokenizer.

    The tokenizer's own comes first, since it is what closes a turn; others follow in ascending order.

    Raises:
        InputError: none of them names a token that there is, or one names something else.
    """
    said = {
        GENERATION: read_generation(folder).get("eos_token_id"),
        "config.json": getattr(text_config, "eos_token_id", None),
        "its tokenizer": tokenizer.eos_token_id,
    }
    known = {i for i in tokenizer.get_vocab().values() if i < text_config.vocab_size}
    for where, eos in said.items():
        if found := known.intersection(token_ids(model, where, eos)):
            return tuple(sorted(found, key=lambda i: (i != tokenizer.eos_token_id, i)))
    raise InputError(f"nothing in {model} says which token ends an answer; put eos_token_id in {GENERATION}.")


def token_ids(model: str, where: str, eos: Any) -> list[int]:
    """What is called eos_token_id, as a list; empty where there is none."""
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in listed):
        raise InputError(
            f"{where} of {model} has the eos_token_id {eos!r}; it must be a token's number, or a list of such."
        )
    return listed


def read_generation(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of how it generates; nothing where it has no such file."""
    return read_json(folder, GENERATION) if (folder / GENERATION).is_file() else {}


def asked_decoding(folder: Path) -> dict[str, float]:
    """What a checkpoint asks for besides plain greedy decoding, by transformers' names; empty where nothing."""
    said = read_generation(folder)
    names = _PENALTIES if said.get("do_sample") is not True else ("do_sample", *_SAMPLING, *_PENALTIES)
    numbers = {name: said[name] for name in names if isinstance(said.get(name), int | float)}
    return {name: value for name, value in numbers.items() if value != _PENALTIES.get(name)}


def is_tied(config: Any) -> bool:
    """Whether a config says, at its top or of its language model, that the head is the embedding."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.text_config))


def tie(tensors: dict[str, Tensor]) -> None:
    """Make head and embedding one tensor: files hold either, or both. Two that differ stay two, as in transformers."""
    import torch

    embed, head = tensors.get(EMBED), tensors.get(HEAD)
    if embed is None and head is not None:
        tensors[EMBED] = head
    elif embed is not None and (head is None or torch.equal(embed, head)):
        tensors[HEAD] = embed


def placed(tensors: Mapping[str, Tensor], precision: Precision, device: str) -> dict[str, Tensor]:
    """Tensors in a precision on a device; what is one tensor under two names, as a tied head is, stays one."""
    import torch

    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        made.setdefault(id(tensor), tensor.to(device, getattr(torch, precision)))
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def load_with_tower(model: str, folder: Path, config: Any, dtype: Any) -> Any:
    """A checkpoint as transformers builds the whole of it, tied as its config says anywhere.

    Args:
        model: its name.
        folder: where it lies.
        config: of it.
        dtype: of torch, or "auto": as the files have it.

    Raises:
        InputError: files lack some of it, which transformers would draw at random.
    """
    from transformers import AutoModelForImageTextToText  # takes seconds to load
    from transformers.utils import logging

    logging.disable_progress_bar()  # a command shows its own
    config = deepcopy(config)
    config.tie_word_embeddings = is_tied(config)
    whole, found = AutoModelForImageTextToText.from_pretrained(
        folder, config=config, dtype=dtype, key_mapping=_OLDER_NAMES, output_loading_info=True
    )
    if found["missing_keys"]:
        raise InputError(
            f"the weights of {model} lack {_few(sorted(found['missing_keys']))}, which transformers needs for the "
            "whole of it; copy the checkpoint again."
        )
    return whole


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"the chat template of {model} cannot be read ({reason}); copy its file again.") from error
    if isinstance(found, list):  # as tokenizer_config.json has them
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(sorted(map(str, found)))
            raise InputError(
                f"the chat templates of {model} are called {names}, and none of them default, so nothing says which "
                "one asks about a video; call it default."
            )
        found = found["default"]
    if not isinstance(found, str):
        raise InputError(
            f"the model {model} has no chat template, so nothing says how to ask it; copy chat_template.jinja (or "
            ".json) there from where the model comes."
        )
    return found
