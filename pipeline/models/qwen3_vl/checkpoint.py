"""A Qwen3-VL checkpoint on disk: what its config says, and the tensors and words that answering needs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import Qwen3VLConfig

from longvlm.pipeline.chat_templates import ChatTemplateError, render
from longvlm.pipeline.model_folder import load_tokenizer, read_json, read_tensors, resolve
from longvlm.pipeline.models.checkpoints import HEAD, chat_template, is_tied, refuse_quantised, tie
from longvlm.pipeline.models.prefix import Sight
from longvlm.pipeline.models.timed_prompt import TimedPrompt
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError

MODEL_TYPE = "qwen3_vl"
TIME_TOKENS = 24  # of `<359999.9 seconds>` a token a byte, and the marks around the tokens: more than is ever needed
_TEXT_PREFIX = re.compile(r"^(?:model\.)?language_model\.")


@dataclass(frozen=True, eq=False)
class QwenCheckpoint:
    """A checkpoint whose config was found to be one that can be answered with."""

    name: str  # as the user named it
    folder: Path
    config: Any  # transformers' own, text_config and vision_config inside

    @property
    def num_streams(self) -> int:
        """Outputs of the tower that the language model reads of each token."""
        return 1 + len(self.config.vision_config.deepstack_visual_indexes)

    @property
    def sight(self) -> Sight:
        """Its own tower."""
        return Sight(self.name, -1, num_global_tokens=0, num_marker_tokens=TIME_TOKENS, marks_pictures=True)

    def tensors(self) -> dict[str, Tensor]:
        """The language model's tensors by their names in transformers' *ForCausalLM, mapped; tied ones are one."""
        tensors = dict(read_tensors(self.folder, _rename))
        if is_tied(self.config):
            tie(tensors)
        return tensors

    def prompt(self) -> TimedPrompt:
        """How it is asked.

        Raises:
            InputError: tokenizer or chat template are missing or damaged, or have no single place for a video.
        """
        tokenizer = load_tokenizer(self.folder)
        template = chat_template(self.name, self.folder, tokenizer)
        ids = [getattr(self.config, f"{mark}_token_id") for mark in ("vision_start", "video", "vision_end", "image")]
        start, video, end, _ = tokenizer.convert_ids_to_tokens(ids)
        place = f"{start}{video}{end}"

        def split(question: str) -> tuple[str, str]:
            content = [{"type": "video"}, {"type": "text", "text": question}]
            try:
                text = render(template, [{"role": "user", "content": content}], tokenizer.special_tokens_map)
            except ChatTemplateError as error:
                raise TerminalError(
                    ErrorCode.ANSWER_FAILED, f"the model's chat template cannot be filled with the question ({error})."
                ) from error
            before, found, after = text.partition(place)
            if not found:
                raise InputError(
                    f"the chat template of {self.name} has no place {place} for a video; take the files that come with "
                    "the checkpoint."
                )
            return before, after

        try:
            return TimedPrompt(self.name, tokenizer, split, ids[1], frozenset({ids[1], ids[3]}))
        except TerminalError as error:
            raise InputError(
                f"{self.name}: {error.message.rstrip('.')}; take the template that comes with the checkpoint."
            ) from error


def find_qwen(model: str) -> QwenCheckpoint:
    """A checkpoint by its config.json alone.

    Raises:
        InputError: it is none of the family, or its weights are quantised.
    """
    folder = resolve(model)
    raw = read_json(folder, "config.json")
    refuse_quantised(model, raw)
    try:
        config = Qwen3VLConfig.from_dict(raw)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).replace("\n", " ").strip().rstrip(".")
        raise InputError(f"config.json of {model} describes no Qwen3-VL ({reason}); correct it.") from error
    return QwenCheckpoint(model, folder, config)


def _rename(name: str) -> str | None:
    """A tensor's name among those of the language model; None for the tower's and for counted buffers."""
    if name == HEAD:
        return name
    inner = _TEXT_PREFIX.match(name)
    if inner is None or name.endswith("rotary_emb.inv_freq"):
        return None
    return f"model.{name[inner.end() :]}"
