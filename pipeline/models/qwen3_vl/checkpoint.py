"""A Qwen3-VL checkpoint on disk: how it is asked, and its language model."""

import re
from dataclasses import dataclass
from typing import Any

from longvlm.pipeline.chat_templates import ChatTemplateError, render
from longvlm.pipeline.model_folder import load_tokenizer
from longvlm.pipeline.models.checkpoints import chat_template
from longvlm.pipeline.models.timed_checkpoint import TimedCheckpoint
from longvlm.pipeline.models.timed_prompt import TimedPrompt
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError

MODEL_TYPE = "qwen3_vl"


@dataclass(frozen=True, eq=False)
class QwenCheckpoint(TimedCheckpoint):
    """A checkpoint whose config was found to be one that can be answered with."""

    family = "Qwen3-VL"
    config_class = "Qwen3VLConfig"
    text_prefix = re.compile(r"^(?:model\.)?language_model\.")
    num_text_tokens = 24  # of `<359999.9 seconds>` a token a byte, and the marks around the tokens

    @property
    def num_streams(self) -> int:
        """The merger's output, and those of the deepstack mergers."""
        return 1 + len(self.config.vision_config.deepstack_visual_indexes)

    def build_llm(self) -> Any:
        """See `TimedCheckpoint.build_llm`."""
        from longvlm.pipeline.models.qwen3_vl.modules import Qwen3VLForCausalLM  # takes seconds to load

        return Qwen3VLForCausalLM(self.config.text_config)

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
