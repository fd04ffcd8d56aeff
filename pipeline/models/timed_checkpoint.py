"""Checkpoints of transformers whose language model reads stored tokens as they are, between texts of time."""

from __future__ import annotations  # torch, which takes seconds to load, stands in annotations alone

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.models.checkpoints import (
    EMBED,
    HEAD,
    LLAMA_FIELDS,
    asked_decoding,
    check_tensors,
    end_marks,
    is_tied,
    placed,
    refuse_quantised,
    tie,
)
from longvlm.pipeline.models.contract import ModelSpec, Vocabulary
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.models.timed_prompt import NAME, TimedPrompt
from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import fingerprint
from longvlm.schemas.recipe import Precision

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class TimedCheckpoint(ABC):
    """A checkpoint whose config was found to be one that can be answered with. Make one with `find`."""

    name: str  # as the user named it
    folder: Path
    config: Any  # transformers' own, text_config and vision_config inside

    family: ClassVar[str]  # what sentences call it
    config_class: ClassVar[str]  # in transformers
    text_prefix: ClassVar[re.Pattern[str]]  # of the language model's tensors in the files, but for the head
    num_text_tokens: ClassVar[int]  # beside each run of tokens in a prompt, at most

    @classmethod
    def find(cls, model: str) -> Self:
        """A checkpoint by its config.json alone.

        Raises:
            InputError: it is none of the family, or its weights are quantised.
        """
        import transformers  # takes seconds to load
        from huggingface_hub.errors import StrictDataclassError

        folder = resolve(model)
        raw = read_json(folder, "config.json")
        refuse_quantised(model, raw)
        try:
            config = getattr(transformers, cls.config_class)(**raw)  # from_dict writes it out for a log
        except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).replace("\n", " ").strip().rstrip(".")
            raise InputError(f"config.json of {model} describes no {cls.family} ({reason}); correct it.") from error
        return cls(model, folder, config)

    @abstractmethod
    def prompt(self) -> TimedPrompt:
        """How it is asked; InputError where files that say so are missing or damaged."""

    @abstractmethod
    def build_llm(self) -> Any:
        """Its language model, a *ForCausalLM; on the meta device where that is the default."""

    @property
    def num_streams(self) -> int:
        """Outputs of the tower that the language model reads of each token."""
        return 1

    @property
    def mm_hidden_size(self) -> int:
        """Width of a stored token."""
        return self.num_streams * int(self.config.text_config.hidden_size)

    @property
    def sight(self) -> Sight:
        """Its own tower."""
        return Sight(self.name, -1, num_global_tokens=0, num_marker_tokens=self.num_text_tokens, marks_pictures=True)

    def describe(self, rules: Mapping[str, int] | None = None) -> ModelSpec:
        """What it is, without building the model; its weights are only mapped and hashed.

        Args:
            rules: numbers of what else decides its answers.

        Raises:
            InputError: the checkpoint lacks something, or its parts do not fit together.
        """
        from longvlm.pipeline.weights import weights_fingerprint

        tensors, prompt, text = self._tensors(), self.prompt(), self.config.text_config
        self._check(tensors)
        eos_ids = end_marks(self.name, self.folder, text, prompt.tokenizer)
        decisive = {
            "tensors": weights_fingerprint(tensors.items()),
            "tokenizer": prompt.tokenizer.backend_tokenizer.to_str(),
            "prompt": prompt.split("What?"),
            "text": {"model_type": text.model_type, **{name: getattr(text, name, None) for name in LLAMA_FIELDS}},
            "places": [prompt.place, sorted(prompt.marks)],
            "eos": eos_ids,
            "rules": dict(rules or {}),
        }
        return ModelSpec(
            name=self.name,
            sight=self.sight,
            weights=fingerprint(decisive),
            mm_hidden_size=self.mm_hidden_size,
            context=text.max_position_embeddings,
            templates=(NAME,),
            family=self.config.model_type,
            vocabulary=Vocabulary(prompt.tokenizer.backend_tokenizer, eos_ids),
            asked_decoding=asked_decoding(self.folder),
            has_projector=False,
        )

    def load(self, precision: Precision, device: str) -> dict[str, Any]:
        """The fields of a `TimedModel`, its language model on a device; the tower is not loaded.

        Raises:
            InputError: as `describe`.
        """
        import torch

        tensors, prompt, text = self._tensors(), self.prompt(), self.config.text_config
        llm = self._check(tensors)
        llm.load_state_dict(placed(tensors, precision, device), assign=True)
        if tensors[HEAD] is tensors[EMBED]:
            llm.lm_head.weight = llm.get_input_embeddings().weight  # one parameter, for training too
        with torch.device(device):
            llm.model.rotary_emb = type(llm.model.rotary_emb)(text)  # its buffers stand in no file
        return {
            "name": self.name,
            "llm": llm.eval().requires_grad_(requires_grad=False),
            "prompt": prompt,
            "eos_ids": end_marks(self.name, self.folder, text, prompt.tokenizer),
            "mm_hidden_size": self.mm_hidden_size,
        }

    def _tensors(self) -> dict[str, Tensor]:
        """The language model's tensors by their names in transformers' *ForCausalLM, mapped; tied ones are one."""
        from longvlm.pipeline.weights import read_tensors

        tensors = dict(read_tensors(self.folder, self._rename))
        if is_tied(self.config):
            tie(tensors)
        return tensors

    def _rename(self, name: str) -> str | None:
        """A tensor's name among those of the language model; None for the tower's and for counted buffers."""
        if name == HEAD:
            return name
        inner = self.text_prefix.match(name)
        if inner is None or name.endswith("rotary_emb.inv_freq"):
            return None
        return f"model.{name[inner.end() :]}"

    def _check(self, tensors: dict[str, Tensor]) -> Any:
        """The language model without weights; InputError unless the files hold exactly what it needs."""
        import torch

        with torch.device("meta"):
            llm = self.build_llm()
        check_tensors(self.name, {name: list(tensor.shape) for name, tensor in llm.state_dict().items()}, tensors)
        return llm
