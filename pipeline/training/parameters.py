"""Trainable parameters: what each stage of training trains, and the weights that come out of it.

projector  the projector, and of the language model only the embeddings of <vid_start> and <vid_end> (LONGVLM.md, 7)
full       projector and language model
lora       the projector, and adapters of the language model that are merged into it at the end

Shape letters: N prefix rows, M rows after projection, R sequences, T positions, D model width, L supervised tokens.
"""

# ruff: noqa: N806 - tensors are named by their shape

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longvlm.pipeline.models.checkpoints import EMBED
from longvlm.pipeline.models.contract import LanguageModel, VideoRows, no_projector
from longvlm.pipeline.models.longvlm.model import LongVLM
from longvlm.pipeline.models.prompt import END, START, token_id
from longvlm.pipeline.models.saving import TrainedWeights
from longvlm.pipeline.training.packing import Example, TrainBatch
from longvlm.pipeline.training.whitening import Whitening, reinitialise
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import TrainRecipe


class TrainableModel(nn.Module):
    """A model in training: its trained parameters are in float32, frozen ones in the recipe's precision.

    Raises:
        InputError: the recipe cannot be carried out with this model.
    """

    def __init__(self, model: LanguageModel, recipe: TrainRecipe, whitening: Whitening | None = None) -> None:
        super().__init__()
        self.model, self.recipe, self.whitening = model, recipe, whitening
        self.llm: Any = model.llm
        if model.projector is None and (recipe.stage == "projector" or recipe.whiten):
            raise InputError(no_projector(model.name))
        self.projector: Any = nn.Identity() if model.projector is None else model.projector
        is_full = recipe.stage == "full"
        self.llm.requires_grad_(requires_grad=is_full).to(
            torch.float32 if is_full else getattr(torch, recipe.precision)
        )
        self.projector.requires_grad_(requires_grad=True).float()
        self.mark_ids, self.marks = self._marks()
        if recipe.stage == "lora":
            self._inject_adapters()
        if whitening is not None:
            first = first_linear(model)
            reinitialise(first, self.llm.get_input_embeddings().weight, recipe.seed)
        if recipe.gradient_checkpointing:
            # named anew in transformers 5.23; the older name goes with 6
            enable = (
                getattr(self.llm, "activation_checkpointing_enable", None) or self.llm.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        self.train()

    def _marks(self) -> tuple[list[int], nn.Parameter | None]:
        """The rows of the embedding that learn by themselves, in the stage `projector`."""
        model = self.model
        if self.recipe.stage != "projector" or not isinstance(model, LongVLM) or not model.use_start_end:
            return [], None
        ids = [token_id(model.tokenizer, token) for token in (START, END)]
        return ids, nn.Parameter(self.llm.get_input_embeddings().weight.detach()[ids].float().clone())

    def _inject_adapters(self) -> None:
        """Put adapters beside the linear layers that the recipe names."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InputError("the stage lora needs peft; pip install 'longvlm-index[train]'.") from error

        recipe = self.recipe
        config = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type] # a float does as well
            lora_dropout=recipe.lora_dropout,
            target_modules=list(recipe.lora_targets),
        )
        torch.manual_seed(recipe.seed)  # of the adapters' first weights
        try:
            inject_adapter_in_model(config, self.llm)
        except ValueError as error:
            raise InputError(
                f"the model {self.model.name} has no linear layers called {', '.join(recipe.lora_targets)}; correct "
                "lora_targets in the training recipe."
            ) from error
        for parameter in self.llm.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters for an optimizer, with their rate (`base_lr`); norms and biases do not decay."""
        recipe = self.recipe
        rates = {True: recipe.projector_learning_rate or recipe.learning_rate, False: recipe.learning_rate}
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                key = (name.startswith(("projector.", "marks")), parameter.ndim > 1)
                found.setdefault(key, []).append(parameter)
        return [
            {"params": members, "base_lr": rates[is_visual], "weight_decay": recipe.weight_decay * decays}
            for (is_visual, decays), members in found.items()
        ]

    def forward(self, examples: Sequence[Example], batch: TrainBatch) -> Tensor:
        """Cross entropy of the batch's labels, summed by their weights; a scalar in float32."""
        hidden = self.hidden_states(examples, batch)
        with self._autocast(hidden.device):
            logits_LV = self.llm.lm_head(hidden.flatten(0, 1)[batch.label_positions])
        losses_L = nn.functional.cross_entropy(logits_LV.float(), batch.labels, reduction="none")
        return (losses_L * batch.weights).sum()

    def hidden_states(self, examples: Sequence[Example], batch: TrainBatch) -> Tensor:
        """The language model's last hidden states over a batch, [R, T, D]."""
        with self._autocast(batch.ids.device):
            embeds_RTD, position_ids = self._embed(batch.ids), batch.position_ids
            rows_of = {number: self._read(examples[number]) for number, _, _ in batch.visual_spans}
            for place, (number, start, end) in enumerate(batch.visual_spans):
                rows = rows_of[number]
                embeds_RTD[place, start:end] = rows.embeds.to(embeds_RTD.dtype)
                if rows.positions is not None:
                    if position_ids.ndim == 2:
                        position_ids = position_ids.expand(3, *position_ids.shape).to(rows.positions.dtype, copy=True)
                    position_ids[:, place, start:end] = rows.positions + start
            found: Tensor = self.llm.get_decoder()(
                inputs_embeds=embeds_RTD,
                attention_mask=batch.attention_mask(),
                position_ids=position_ids,
                use_cache=False,
                **_added(rows_of, batch),
            ).last_hidden_state
        return found

    def _embed(self, ids_RT: Tensor) -> Tensor:  # noqa: N803
        embeds: Tensor = self.llm.get_input_embeddings()(ids_RT)
        embeds = embeds.clone()  # what a leaf gave cannot be written into
        if self.marks is not None:
            for token, row in zip(self.mark_ids, self.marks, strict=True):
                embeds = torch.where((ids_RT == token)[..., None], row.to(embeds.dtype), embeds)
        return embeds

    def _read(self, example: Example) -> VideoRows:
        rows_NC = example.prefix.rows.to(self.model.device)
        if self.whitening is not None:
            rows_NC = self.whitening(rows_NC)
        return self.model.read(replace(example.prefix, rows=rows_NC))

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    # --- trained weights ---

    def trained_weights(self) -> TrainedWeights:
        """All that training changed, whole: every worker has to ask, where the weights are sharded."""
        projector = {name: full_tensor(tensor) for name, tensor in self.projector.state_dict().items()}
        if self.whitening is not None:
            first, name = first_linear(self.model), _first_name(self.model)
            weight, bias = self.whitening.folded(full_tensor(first.weight), full_tensor(first.bias))
            projector |= {f"{name}weight": weight, f"{name}bias": bias}
        llm: dict[str, Tensor] = {}
        if self.recipe.stage == "full":
            llm = {name: full_tensor(tensor) for name, tensor in self.llm.state_dict().items()}
        elif self.recipe.stage == "lora":
            llm = {f"{name}.weight": _merged(module) for name, module in _adapters(self.llm).items()}
        elif self.marks is not None:
            llm[EMBED] = full_tensor(self.llm.get_input_embeddings().weight)
            llm[EMBED][self.mark_ids] = full_tensor(self.marks)
        return TrainedWeights(llm, projector)

    def merge_and_unload(self) -> LanguageModel:
        """Merge adapters and whitening into the model and give it back, ready to answer.

        For weights that lie in one process. Training cannot go on afterwards.
        """
        trained = self.trained_weights()
        for name, module in _adapters(self.llm).items():
            self.llm.set_submodule(name, module.base_layer)
        self.llm.load_state_dict(trained.llm, strict=False)
        self.projector.load_state_dict(trained.projector)
        self.whitening = self.marks = None
        if self.recipe.gradient_checkpointing:
            self.llm.gradient_checkpointing_disable()
        dtype = self.llm.get_input_embeddings().weight.dtype
        self.eval().to(dtype).requires_grad_(requires_grad=False)
        return self.model


def _added(rows_of: Mapping[int, VideoRows], batch: TrainBatch) -> dict[str, Any]:
    """What a decoder adds to its hidden states after its first blocks, where a model has such (DeepStack)."""
    added = [rows_of[number].added for number, _, _ in batch.visual_spans]
    if not added or added[0] is None:
        return {}
    is_video_RT = torch.zeros_like(batch.ids, dtype=torch.bool)
    for place, (_, start, end) in enumerate(batch.visual_spans):
        is_video_RT[place, start:end] = True
    layers = torch.cat(added, dim=1)  # type: ignore[arg-type] # all of a model's videos, or none
    return {"visual_pos_masks": is_video_RT, "deepstack_visual_embeds": list(layers)}


def first_linear(model: LanguageModel) -> nn.Linear:
    """The layer of a projector that tokens come into."""
    name = _first_name(model).removesuffix(".")
    assert model.projector is not None, "refused before"
    layer: nn.Linear = model.projector.get_submodule(name) if name else model.projector  # type: ignore[assignment]
    if layer.bias is None:
        raise InputError(f"the projector of {model.name} has no bias for a whitening to go into; set whiten = false.")
    return layer


def _first_name(model: LanguageModel) -> str:
    return "" if isinstance(model.projector, nn.Linear) else "linear_1."


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded, float32 on this worker's CPU; never a view of the given one."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", torch.float32, copy=True)


def _adapters(llm: nn.Module) -> dict[str, Any]:
    """Linear layers with an adapter beside them, by name."""
    return {name: module for name, module in llm.named_modules() if hasattr(module, "lora_A")}


def _merged(module: Any) -> Tensor:
    """W + scaling B A (arXiv 2106.09685, section 4.1)."""
    ((adapter, scaling),) = module.scaling.items()
    down, up = (full_tensor(part[adapter].weight) for part in (module.lora_A, module.lora_B))
    return full_tensor(module.base_layer.weight) + scaling * (up @ down)


def apply_fsdp(trainable: TrainableModel) -> None:
    """Shard a model in training over all workers of the process group (FSDP), a unit a layer of the model.

    Each holds a part, and gathers a layer whole only while it computes it. Every worker has to come with the same
    weights, and to take every step from then on.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(trainable.model.device.type, (dist.get_world_size(),))
    for layer in trainable.llm.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trainable, mesh=mesh)
