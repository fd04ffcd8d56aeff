"""SmolVLM2 when answering: its language model over what its connector made of a video.

The prompt says how many frames there are, in words, and how long the video is; each run of tokens stands behind `Frame
from 00:12:`, between marks. As long as nothing is merged a run is a frame, and prompts are transformers' own, token by
token. Once tokens are merged a run is a segment, with the middle of its time, and the number in words is that of runs.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from longvlm.pipeline.model_folder import weights_fingerprint
from longvlm.pipeline.models.checkpoints import (
    EMBED,
    HEAD,
    LLAMA_FIELDS,
    asked_decoding,
    check_tensors,
    end_marks,
    placed,
)
from longvlm.pipeline.models.contract import ModelSpec, Vocabulary
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.row_layout import TokenBlock, timed_runs
from longvlm.pipeline.models.smolvlm.checkpoint import FAKE, GLOBAL, SmolCheckpoint, find_smol
from longvlm.pipeline.models.smolvlm.words import in_words
from longvlm.pipeline.models.timed_model import TimedModel
from longvlm.pipeline.models.timed_prompt import NAME, TimedPrompt
from longvlm.schemas.fingerprint import fingerprint
from longvlm.schemas.recipe import Precision


@dataclass(frozen=True, eq=False)
class SmolModel(TimedModel):
    """A loaded SmolVLM2, without its tower and connector."""

    def blocks(self, prefix: VideoPrefix) -> list[TokenBlock]:
        """See `time_blocks`."""
        return time_blocks(self.prompt, prefix)

    def num_text_rows(self, start_s: float, end_s: float) -> int:
        """Of the longer of its two times, and the mark after it."""
        return 1 + max(len(self.prompt.encode(_time_text(time_s))) for time_s in (start_s, end_s))


def time_blocks(prompt: TimedPrompt, prefix: VideoPrefix) -> list[TokenBlock]:
    """Each run of a video's tokens behind its time, between marks; the first one after what is said of the video.

    Raises:
        ValueError: the prefix does not say when its tokens were seen.
    """
    runs = timed_runs(prefix)
    assert prefix.times is not None, "`timed_runs` has seen to it"
    length = timedelta(seconds=int(max(prefix.times.ends_s)))
    lead = (
        f"{prompt.gap}You are provided the following series of {in_words(len(runs))} frames from a {length} [H:MM:SS] "
        "video.\n"
    )
    found, after = [], prompt.encode(FAKE)
    for run in runs:
        found.append(TokenBlock(run.num_tokens, prompt.encode(f"{lead}{_time_text(run.time_s)}"), after))
        lead = ""
    return found


def _time_text(time_s: float) -> str:
    """What stands before a frame's tokens."""
    return f"\nFrame from {int(time_s // 60):02}:{int(time_s % 60):02}:{FAKE}{GLOBAL}"


def describe_smol(model: str) -> ModelSpec:
    """What a checkpoint is, without building the model; its weights are only mapped and hashed.

    Raises:
        InputError: the checkpoint lacks something, or its parts do not fit together.
    """
    checkpoint = find_smol(model)
    tensors, prompt, text = checkpoint.tensors(), checkpoint.prompt(), checkpoint.config.text_config
    _check(checkpoint, tensors)
    eos_ids = end_marks(model, checkpoint.folder, text, prompt.tokenizer)
    decisive = {
        "tensors": weights_fingerprint(tensors.items()),
        "tokenizer": prompt.tokenizer.backend_tokenizer.to_str(),
        "prompt": prompt.split("What?"),
        "text": {"model_type": text.model_type, **{name: getattr(text, name, None) for name in LLAMA_FIELDS}},
        "place": prompt.place,
        "eos": eos_ids,
    }
    return ModelSpec(
        name=model,
        sight=checkpoint.sight,
        weights=fingerprint(decisive),
        mm_hidden_size=text.hidden_size,
        context=text.max_position_embeddings,
        templates=(NAME,),
        family=checkpoint.config.model_type,
        vocabulary=Vocabulary(prompt.tokenizer.backend_tokenizer, eos_ids),
        asked_decoding=asked_decoding(checkpoint.folder),
        has_projector=False,
    )


def load_smol(model: str, precision: Precision = "float32", device: str = "cpu") -> SmolModel:
    """The language model of a checkpoint on a device; its tower and connector are not loaded.

    Raises:
        InputError: as `describe_smol`.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    checkpoint = find_smol(model)
    text, tensors, prompt = checkpoint.config.text_config, checkpoint.tensors(), checkpoint.prompt()
    llm = _check(checkpoint, tensors)
    llm.load_state_dict(placed(tensors, precision, device), assign=True)
    if tensors[HEAD] is tensors[EMBED]:
        llm.lm_head.weight = llm.get_input_embeddings().weight  # one parameter, for training too
    with torch.device(device):
        llm.model.rotary_emb = LlamaRotaryEmbedding(text)  # its buffers stand in no file
    return SmolModel(
        name=model,
        llm=llm.eval().requires_grad_(requires_grad=False),
        prompt=prompt,
        eos_ids=end_marks(model, checkpoint.folder, text, prompt.tokenizer),
        mm_hidden_size=text.hidden_size,
    )


def _check(checkpoint: SmolCheckpoint, tensors: dict[str, Tensor]) -> Any:
    """The language model without weights; InputError unless the files hold exactly what it needs."""
    from transformers import LlamaForCausalLM  # takes seconds to load

    with torch.device("meta"):
        llm = LlamaForCausalLM(checkpoint.config.text_config)
    check_tensors(checkpoint.name, {name: list(tensor.shape) for name, tensor in llm.state_dict().items()}, tensors)
    return llm
