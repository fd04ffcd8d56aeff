"""LongVLM: a LLaMA and a linear projector in the reference's checkpoint layout (LONGVLM.md section 5).

Shape letters: N prefix rows, C tower channels, T prompt tokens, D model width.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pipeline.language.checkpoint import FAMILIES, Checkpoint, find_checkpoint
from pipeline.language.prompt import START, VIDEO_TOKENS, Prompt, token_id
from pipeline.language.tokenizer import load_tokenizer, special_ids
from pipeline.vision.checkpoint import read_json, resolve, weights_fingerprint
from schemas.errors import InputError
from schemas.recipe import Precision, fingerprint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECT, PROJECT_BIAS = "model.mm_projector.weight", "model.mm_projector.bias"
NUM_GLOBAL_TOKENS = 5  # LONGVLM.md section 1: memory rows used


@dataclass(frozen=True)
class ModelSpec:
    """What a model is, as far as stores and recipes care."""

    name: str  # folder or hub id, as the user named it
    tower: str  # the vision tower whose tokens it reads: a folder or hub id
    weights: str  # fingerprint of all that decides its answers: equal for equal weights, however they are stored
    mm_hidden_size: int  # width of a visual token: the projector's input
    hidden_size: int
    vocab_size: int  # rows of the embedding, the three video tokens included
    context: int  # longest prompt and answer, in tokens
    use_start_end: bool
    num_global_tokens: int = NUM_GLOBAL_TOKENS
    family: str = "longvlm"


@dataclass(frozen=True, eq=False)
class LongVLM:
    """A loaded model, ready to embed prompts and to be decoded from."""

    name: str
    llm: LlamaForCausalLM
    projector: nn.Linear
    tokenizer: Tokenizer
    use_start_end: bool
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]  # rows of the head that were never trained: never to be emitted

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return int(self.llm.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.projector.weight.device

    def embed_prompt(self, prompt: Prompt, prefix_NC: Tensor) -> Tensor:
        """The prompt's embeddings [T, D], the projected prefix standing in the patches' places."""
        if prompt.num_patches != len(prefix_NC):
            raise ValueError(f"the prompt has {prompt.num_patches} patches for {len(prefix_NC)} prefix rows")
        ids_T = torch.tensor(prompt.ids, device=self.device)
        embeds_TD = self.llm.get_input_embeddings()(ids_T)
        video_ND = self.projector(prefix_NC.to(self.device, self.projector.weight.dtype))
        embeds_TD[prompt.first_patch : prompt.first_patch + prompt.num_patches] = video_ND
        return embeds_TD

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some token ids, without those that stand for none."""
        special = special_ids(self.tokenizer)  # the tokenizer's own way of skipping overlooks normalised ones
        return self.tokenizer.decode([i for i in ids if i not in special], skip_special_tokens=False)


def is_longvlm(model: str) -> bool:
    """Whether a folder or hub id holds a language model of this family, and not a vision tower, by its config alone.

    Raises:
        InputError: there is no such model, or it has no config.json.
    """
    return read_json(resolve(model), "config.json").get("model_type") in FAMILIES


def describe_model(model: str, projector: str | None = None) -> ModelSpec:
    """What a LongVLM checkpoint is, without building the model; its weights are only mapped and hashed.

    Args:
        model: a folder or hub id (see `find_checkpoint`).
        projector: a projector file in place of the folder's own.

    Raises:
        InputError: the checkpoint lacks something, or is not one.
    """
    checkpoint = find_checkpoint(model, projector)
    tower = checkpoint.tower
    tensors, tokenizer = _assemble(checkpoint)
    config = _llama_config(checkpoint, tensors)
    _check_tensors(checkpoint, tensors, config)
    decisive = {
        "tensors": weights_fingerprint(tensors.items()),
        "tokenizer": tokenizer.to_str(),
        "config": {**checkpoint.llama, "vocab_size": config.vocab_size, "use_start_end": checkpoint.use_start_end},
    }
    return ModelSpec(
        name=model,
        tower=tower,
        weights=fingerprint(decisive),
        mm_hidden_size=tensors[PROJECT].shape[1],
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        use_start_end=checkpoint.use_start_end,
    )


def load_longvlm(
    model: str, precision: Precision = "float32", device: str = "cpu", projector: str | None = None
) -> LongVLM:
    """A LongVLM checkpoint, consolidated or base and projector, on a device.

    Raises:
        InputError: the checkpoint lacks something, or its parts do not fit together.
    """
    checkpoint = find_checkpoint(model, projector)
    tensors, tokenizer = _assemble(checkpoint)
    config = _llama_config(checkpoint, tensors)
    _check_tensors(checkpoint, tensors, config)
    weights = {name: tensor.to(device, getattr(torch, precision)) for name, tensor in tensors.items()}
    with torch.device("meta"):  # shapes only: the weights are put in place below, without a second copy
        llm = LlamaForCausalLM(config)
        linear = nn.Linear(tensors[PROJECT].shape[1], config.hidden_size)
    linear.load_state_dict({"weight": weights.pop(PROJECT), "bias": weights.pop(PROJECT_BIAS)}, assign=True)
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBED]
    llm.load_state_dict(weights, assign=True)
    with torch.device(device):
        llm.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers stand in no file
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    video_ids = sorted(token_id(tokenizer, token) for token in VIDEO_TOKENS)
    return LongVLM(
        name=model,
        llm=llm.eval().requires_grad_(requires_grad=False),
        projector=linear.eval().requires_grad_(requires_grad=False),
        tokenizer=tokenizer,
        use_start_end=checkpoint.use_start_end,
        eos_ids=tuple(eos),
        banned_ids=(*video_ids, *range(tokenizer.get_vocab_size(), config.vocab_size)),
    )


def _assemble(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Tokenizer]:
    """The model's tensors, and its tokenizer with the video tokens: base, three rows more, then the projector's file.

    The order is the reference's at inference (LONGVLM.md section 5). New rows of the head, which nobody trained, are
    zero; those ids are never emitted.
    """
    tensors, apart = checkpoint.tensors(), checkpoint.projector_tensors()
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    if lacking := [name for name in (PROJECT, PROJECT_BIAS) if name not in {**tensors, **apart}]:
        raise InputError(
            f"the model {checkpoint.name} has no projector ({', '.join(lacking)}); put training's mm_projector.bin "
            "beside its weights, or name a consolidated checkpoint."
        )
    if EMBED not in tensors:
        raise InputError(f"the weights of {checkpoint.name} lack {EMBED}; copy the checkpoint again.")
    num_tokens, num_rows = tokenizer.get_vocab_size(), len(tensors[EMBED])
    if num_tokens == num_rows + len(VIDEO_TOKENS):
        if EMBED not in apart and checkpoint.use_start_end:
            raise InputError(
                f"the model {checkpoint.name} is a base model without trained embeddings of {START} and its like, and "
                f"its projector file lacks {EMBED} too; take the mm_projector file that LongVLM's training saved."
            )
        for name in {EMBED, HEAD} & set(tensors):
            tensors[name] = nn.functional.pad(tensors[name], (0, 0, 0, len(VIDEO_TOKENS)))
    elif num_tokens > num_rows:
        raise InputError(
            f"the model {checkpoint.name} has {num_rows} embedding rows, but its tokenizer has {num_tokens} tokens "
            f"with {', '.join(VIDEO_TOKENS)}; take the tokenizer that belongs to the weights."
        )
    if EMBED in apart and apart[EMBED].shape != tensors[EMBED].shape:
        raise InputError(
            f"the projector {checkpoint.projector} was trained with embeddings {list(apart[EMBED].shape)}, but the "
            f"model {checkpoint.name} needs {list(tensors[EMBED].shape)}; take the two that belong together."
        )
    return {**tensors, **{name: apart[name] for name in (PROJECT, PROJECT_BIAS, EMBED) if name in apart}}, tokenizer


def _llama_config(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> LlamaConfig:
    try:
        return LlamaConfig(**{**checkpoint.llama, "vocab_size": len(tensors[EMBED])})
    except (StrictDataclassError, ValueError, KeyError) as error:
        reason = str(error).replace("\n", " ").strip().rstrip(".")
        raise InputError(f"config.json of {checkpoint.name} describes no LLaMA ({reason}); correct it.") from error


def _check_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor], config: LlamaConfig) -> None:
    """InputError unless the files hold exactly the tensors that the config asks for."""
    with torch.device("meta"):
        llm = LlamaForCausalLM(config)
    expected = {name: list(tensor.shape) for name, tensor in llm.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[HEAD]
    expected[PROJECT] = [config.hidden_size, tensors[PROJECT].shape[-1]]
    expected[PROJECT_BIAS] = [config.hidden_size]
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
            f"the weights of {checkpoint.name} do not fit its config.json: they {' and '.join(said)}; "
            "copy the checkpoint again, or correct config.json."
        )


def _few(names: list[str]) -> str:
    """Up to five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more
