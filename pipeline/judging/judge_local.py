"""A chat model on this machine, as a judge: the folder of a causal language model with a chat template."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from longvlm.pipeline.chat_templates import ChatTemplateError, render
from longvlm.pipeline.judging.judges import Messages
from longvlm.pipeline.model_folder import load_tokenizer, resolve, short_name
from longvlm.pipeline.weights import read_tensors, weights_fingerprint
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError

_MAX_NEW_TOKENS = 128  # a dictionary of two, and words around it


class LocalChatModel:
    """A chat model of transformers that replies greedily, one conversation at a time."""

    concurrency = 1

    def __init__(self, model: str) -> None:
        """Load a folder's (or hub snapshot's) weights and tokenizer; remote code is never run.

        Raises:
            InputError: there is no such model, it is no causal language model, or it has no chat template that can be
                filled.
        """
        folder = resolve(model)
        self._tokenizer = load_tokenizer(folder)
        if not self._tokenizer.chat_template:
            raise InputError(
                f"the judge {model} has no chat template, so nothing says how to ask it; use a chat model."
            )
        try:
            self._template = self._tokenizer.get_chat_template()
            self._prompt([{"role": "system", "content": "Judge."}, {"role": "user", "content": "What?"}])
        except (ValueError, ChatTemplateError) as error:
            raise InputError(
                f"the chat template of the judge {model} cannot be filled ({error}); take the one that comes with it."
            ) from error
        weights = weights_fingerprint(read_tensors(folder, lambda name: name))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(f"the judge {model} cannot be loaded ({reason}); name a causal language model.") from error
        self._llm = loaded.to(device).eval()
        end = self._llm.generation_config.eos_token_id or self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        self._llm.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=_MAX_NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=pad if pad is not None else self._tokenizer.eos_token_id,
        )
        self.name = f"local:{short_name(model)}@{weights}"

    @torch.inference_mode()
    def reply(self, messages: Messages) -> str:
        """The model's reply.

        Raises:
            TerminalError: JUDGE_FAILED: its template or context cannot take the messages.
        """
        try:
            text = self._prompt(messages)
        except ChatTemplateError as error:
            raise TerminalError(ErrorCode.JUDGE_FAILED, f"the judge's chat template refuses: {error}.") from error
        inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"].to(self._llm.device)
        context = self._llm.config.get_text_config().max_position_embeddings
        if ids.shape[1] + _MAX_NEW_TOKENS > context:
            raise TerminalError(
                ErrorCode.JUDGE_FAILED, f"{ids.shape[1]} tokens of prompt do not fit the judge's {context} of context."
            )
        said = self._llm.generate(ids, attention_mask=torch.ones_like(ids))
        reply: str = self._tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        return reply.strip()

    def _prompt(self, messages: Messages) -> str:
        return render(self._template, messages, self._tokenizer.special_tokens_map)

    def close(self) -> None:
        """Do nothing: no reply is waited for, and the memory goes with the object."""
