"""LongVLM: a LLaMA and a linear projector in the reference's checkpoint layout (LONGVLM.md section 5).

Shape letters: N prefix rows, M rows with time markers, D model width.
"""

# ruff: noqa: N806 - tensors are named by their shape

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longvlm.pipeline.models.checkpoints import EMBED, HEAD, asked_decoding, check_tensors
from longvlm.pipeline.models.contract import Extent, ModelSpec, Prompt, VideoRows, Vocabulary
from longvlm.pipeline.models.longvlm.checkpoint import Checkpoint, find_checkpoint
from longvlm.pipeline.models.longvlm.tokenizer import load_tokenizer
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.prompt import (
    END,
    START,
    VIDEO_TOKENS,
    PromptLayout,
    lay_out,
    marker_ids,
    option_ids,
    silent_ids,
    tidy,
    token_id,
    turn_ids,
)
from longvlm.pipeline.models.row_layout import TokenBlock, fold, interleave
from longvlm.pipeline.transfer import to_device
from longvlm.pipeline.weights import weights_fingerprint
from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import fingerprint
from longvlm.schemas.recipe import Precision

PROJECT, PROJECT_BIAS = "model.mm_projector.weight", "model.mm_projector.bias"


@dataclass(frozen=True, eq=False)
class LongVLM:
    """A loaded model, ready to embed prompts and to be decoded from."""

    name: str
    llm: LlamaForCausalLM
    projector: nn.Linear
    tokenizer: Tokenizer
    use_start_end: bool
    layout: PromptLayout
    templates: tuple[str, ...]
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]  # rows of the head that were never trained: never to be emitted
    option_temperature: float = 1.0  # see `Checkpoint.option_temperature`

    @property
    def mark_ids(self) -> tuple[int, ...]:
        """Its video tokens, which the base model's vocabulary lacks."""
        return tuple(token_id(self.tokenizer, token) for token in (START, END)) if self.use_start_end else ()

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return int(self.llm.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.projector.weight.device

    @property
    def vocabulary(self) -> Vocabulary:
        """What its answers are spelt in."""
        return Vocabulary(self.tokenizer, self.eos_ids)

    @property
    def mm_hidden_size(self) -> int:
        """Width of a visual token before projection."""
        return self.projector.in_features

    def read(self, prefix: VideoPrefix) -> VideoRows:
        """A video's rows, each projected by itself, markers in between."""
        rows_ND: Tensor = self.projector(to_device(prefix.rows, self.device).to(self.projector.weight.dtype))
        if self.layout == "plain":
            return VideoRows(rows_ND)
        return VideoRows(interleave(rows_ND, self._blocks(prefix), self.llm.get_input_embeddings()))

    def extent(self, prefix: VideoPrefix) -> Extent:
        """As many rows as there are, and the markers' tokens."""
        num_rows = len(prefix.rows) + sum(len(self._marker_ids(start_s)) for start_s in _starts_s(prefix))
        return Extent(num_rows, num_rows)

    def fold(self, seen_M: Tensor, prefix: VideoPrefix) -> Tensor:  # noqa: N803
        """What a segment's marker drew is shared equally among its local rows."""
        return seen_M if self.layout == "plain" else fold(seen_M, self._blocks(prefix))

    def num_text_rows(self, start_s: float, end_s: float) -> int:  # noqa: ARG002 - a marker says when it began
        """A marker's."""
        return len(self._marker_ids(start_s))

    def caption_row(self, prefix: VideoPrefix, at_s: float) -> int:
        """Where the marker of the segment shown at a time ends."""
        if self.layout == "plain" or prefix.times is None:
            raise InputError("it is a timed caption, and prompts of this model have no time markers to learn it at.")
        segment = max(bisect_right(prefix.times.starts_s, at_s) - 1, 0)
        return sum(block.num_rows for block in self._blocks(prefix)[: segment + 2]) - 1  # a block is of global rows

    def _blocks(self, prefix: VideoPrefix) -> list[TokenBlock]:
        """The global rows, then each segment's with its marker."""
        if prefix.times is None:
            raise ValueError(f"the prompts of {self.name} say when segments began, and nobody did")
        timed = zip(prefix.times.counts, prefix.times.starts_s, strict=True)
        segments = [TokenBlock(count, after=self._marker_ids(start_s)) for count, start_s in timed]
        return [TokenBlock(prefix.times.num_global), *segments]

    def _marker_ids(self, start_s: float) -> tuple[int, ...]:
        """The tokens that stand after the rows of a segment that began then; none in the layout `plain`."""
        return marker_ids(self.tokenizer, start_s) if self.layout == "time_markers" else ()

    def lay_out(
        self,
        question: str,
        num_visual_tokens: int,
        template: str,
        *,
        may_think: bool = False,  # noqa: ARG002 - no template of it opens thinking
    ) -> Prompt:
        """The prompt of a question about `num_visual_tokens` rows.

        Raises:
            InputError: there is no such template.
            TerminalError: ANSWER_FAILED if the question itself contains one of the video tokens.
        """
        return lay_out(self.tokenizer, question, num_visual_tokens, use_start_end=self.use_start_end, name=template)

    def turn_ids(self, question: str, template: str) -> tuple[int, ...]:
        """The ids of a further question about the same video, after a closed answer."""
        return turn_ids(self.tokenizer, question, template)

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids that each option has as an answer, after the space that follows the cue."""
        return option_ids(self.tokenizer, options)

    def decode(self, ids: Iterable[int]) -> str:
        """The answer that some token ids spell, without marks and surrounding white space."""
        silent = silent_ids(self.tokenizer)  # the tokenizer's own way of skipping overlooks normalised ones
        return tidy(self.tokenizer.decode([i for i in ids if i not in silent], skip_special_tokens=False))


def _starts_s(prefix: VideoPrefix) -> tuple[float, ...]:
    return prefix.times.starts_s if prefix.times else ()


def describe_longvlm(model: str, projector: str | None = None) -> ModelSpec:
    """What a LongVLM checkpoint is, without building the model; its weights are only mapped and hashed.

    Args:
        model: a folder or hub id (see `find_checkpoint`).
        projector: a projector file in place of the folder's own.

    Raises:
        InputError: the checkpoint lacks something, or is not one.
    """
    checkpoint = find_checkpoint(model, projector)
    sight = checkpoint.sight
    tensors, tokenizer = assemble(checkpoint)
    config = _llama_config(checkpoint, tensors)
    _check_tensors(checkpoint, tensors, _unfilled(config))
    layout = {} if checkpoint.layout == "plain" else {"layout": checkpoint.layout}  # older fingerprints stay
    heat = {} if checkpoint.option_temperature == 1 else {"option_temperature": checkpoint.option_temperature}
    settings = {"vocab_size": config.vocab_size, "use_start_end": checkpoint.use_start_end, **layout, **heat}
    decisive = {
        "tensors": weights_fingerprint(tensors.items()),
        "tokenizer": tokenizer.to_str(),
        "config": {**checkpoint.llama, **settings},
    }
    return ModelSpec(
        name=model,
        sight=sight,
        weights=fingerprint(decisive),
        mm_hidden_size=tensors[PROJECT].shape[1],
        context=config.max_position_embeddings,
        templates=checkpoint.templates,
        family="longvlm",
        vocabulary=Vocabulary(tokenizer, checkpoint.eos_ids(tokenizer)),
        asked_decoding=asked_decoding(checkpoint.folder),
    )


def load_longvlm(
    model: str, precision: Precision = "float32", device: str = "cpu", projector: str | None = None
) -> LongVLM:
    """A LongVLM checkpoint, consolidated or base and projector, on a device.

    Raises:
        InputError: the checkpoint lacks something, or its parts do not fit together.
    """
    checkpoint = find_checkpoint(model, projector)
    tensors, tokenizer = assemble(checkpoint)
    config = _llama_config(checkpoint, tensors)
    llm = _unfilled(config)
    _check_tensors(checkpoint, tensors, llm)
    weights = {name: tensor.to(device, getattr(torch, precision)) for name, tensor in tensors.items()}
    with torch.device("meta"):
        linear = nn.Linear(tensors[PROJECT].shape[1], config.hidden_size)
    linear.load_state_dict({"weight": weights.pop(PROJECT), "bias": weights.pop(PROJECT_BIAS)}, assign=True)
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBED]
    llm.load_state_dict(weights, assign=True)
    with torch.device(device):
        llm.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers stand in no file
    video_ids = sorted(token_id(tokenizer, token) for token in VIDEO_TOKENS)
    return LongVLM(
        name=model,
        llm=llm.eval().requires_grad_(requires_grad=False),
        projector=linear.eval().requires_grad_(requires_grad=False),
        tokenizer=tokenizer,
        use_start_end=checkpoint.use_start_end,
        layout=checkpoint.layout,
        templates=checkpoint.templates,
        eos_ids=checkpoint.eos_ids(tokenizer),
        banned_ids=(*video_ids, *range(tokenizer.get_vocab_size(), config.vocab_size)),
        option_temperature=checkpoint.option_temperature,
    )


def assemble(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Tokenizer]:
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


def _unfilled(config: LlamaConfig) -> LlamaForCausalLM:
    """A language model of shapes alone: weights are put in their places later, without a second copy."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def _check_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor], llm: LlamaForCausalLM) -> None:
    """InputError unless the files hold exactly the tensors that the model has."""
    config, expected = llm.config, {name: list(tensor.shape) for name, tensor in llm.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[HEAD]
    expected[PROJECT] = [config.hidden_size, tensors[PROJECT].shape[-1]]
    expected[PROJECT_BIAS] = [config.hidden_size]
    check_tensors(checkpoint.name, expected, tensors)
