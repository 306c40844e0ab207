"""The only place that changes a model's shape or what in it trains; what to change is planned elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from mfext.config import ModelConfig
from mfext.errors import InputError
from mfext.growth.banks import bank_parameters
from mfext.growth.plan import AddBlocks, AddExperts, FreezeExperts, Plan, PruneExperts, old_layers
from mfext.model.experts import AttentionExperts, FeedForwardExperts
from mfext.model.generation import Generation, GenerationLayer
from mfext.model.initialisation import STD, draw_experts
from mfext.model.language_model import LanguageModel
from mfext.model.moduleformer import Block, ModuleFormer
from mfext.model.router import Router, RouterRows, Site

Usage = Mapping[Site, Tensor]


def apply_plan(model: ModuleFormer, plan: Plan, usage: Usage | None = None) -> None:
    """Carry out `plan` on `model`, in place.

    `usage` gives each base expert's share of the new domain's tokens per site; `copy_most_used`
    starts new experts from the busiest ones (in order of number without it). Raises InputError
    where the plan was made for another model.
    """
    require_fit(model, plan)
    for operation in plan.operations:
        if isinstance(operation, FreezeExperts):
            freeze(model)
        elif isinstance(operation, AddExperts):
            _add(model, plan, operation, usage)
        elif isinstance(operation, AddBlocks):
            _insert(model, plan)
        elif isinstance(operation, PruneExperts):
            _cut(model, operation)
        else:
            names = [each.name for each in plan.before.generations]
            del model.generations[names.index(operation.generation)]  # the newest first: numbers before it stand
    set_config(model, plan.after)


def require_fit(model: ModuleFormer, plan: Plan) -> None:
    """Raise InputError where the plan was made for another model."""
    if model.config != plan.before:
        raise InputError(
            "the plan does not fit the model", "growth", "it was made for another configuration; plan again"
        )


def set_config(model: ModuleFormer, config: ModelConfig) -> None:
    """Tell the model, its blocks and its generations that they are now of this config."""
    model.config = config
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.config = block.feedforward.config = config
    for number, own in enumerate(config.generations, 1):
        model.generation(number).config = own


def put_parameter(model: ModuleFormer, name: str, value: Tensor) -> None:
    """A new parameter, of another number of rows, in place of the one called `name`; it trains if that one did."""
    owner, _, last = name.rpartition(".")
    module, old = model.get_submodule(owner), model.get_parameter(name)
    setattr(module, last, nn.Parameter(value.detach(), requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features = value.shape[0]


def freeze(model: LanguageModel) -> None:
    """Nothing in the model trains any more; gradients already held are dropped."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def set_trainable(model: LanguageModel, names: set[str]) -> None:
    """Exactly the parameters named train. Raises InputError for a name the model does not have."""
    parameters = dict(model.named_parameters())
    unknown = sorted(names - parameters.keys())
    if unknown:
        raise InputError(f"no parameter '{unknown[0]}'", "model", "see `mfext inspect` for the model's parts")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def set_gate_thresholds(model: ModuleFormer, opens_at: float, full_at: float) -> None:
    """Move the newest generation's gate thresholds, in the module and in every config."""
    generation = model.generation(len(model.generations))
    gate = generation.gate
    if gate is None:
        raise InputError("no domain gate", generation.config.name, "only generations of mode gated have one")
    gate.config = replace(gate.config, opens_at=opens_at, full_at=full_at)
    newest = replace(generation.config, gate=gate.config)
    set_config(model, replace(model.config, generations=(*model.config.generations[:-1], newest)))


def hold_gate_open(model: ModuleFormer) -> None:
    """Open the newest generation's gate on every token: its changes then reach all text."""
    gate = model.generation(len(model.generations)).gate
    assert gate is not None, "only generations of mode gated have one"
    gate.hold_open()


def _add(model: ModuleFormer, plan: Plan, operation: AddExperts, usage: Usage | None) -> None:
    weight = model.embedding.weight
    generation = Generation(operation.generation, plan.after).to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            grown = generation.layers[layer]
            assert isinstance(block, Block) and isinstance(grown, GenerationLayer)
            for old, new, site in (
                (block.attention.experts, grown.attention, block.attention.site),
                (block.feedforward.experts, grown.feedforward, block.feedforward.site),
            ):
                if new is not None:
                    _start_experts(old, new, operation, None if usage is None else usage[site], plan)
            for router in (grown.attention_router, grown.feedforward_router):
                _start_router(router, operation)
        if generation.gate is not None:
            generation.gate.reset_parameters()
    model.generations.append(generation)


def _cut(model: ModuleFormer, operation: PruneExperts) -> None:
    """The rows of removed experts leave; a null choice behind them stays."""
    for cut in operation.cuts:
        for name, parameter in bank_parameters(model, cut.key).items():
            put_parameter(model, name, parameter[[*cut.kept, *range(cut.of, parameter.shape[0])]])


@torch.no_grad()
def _insert(model: ModuleFormer, plan: Plan) -> None:
    """Old layers as they are, renumbered; new ones copies of the layer before them with zero outputs."""
    weight, moved = model.embedding.weight, old_layers(plan)
    blocks: list[Block] = []
    for layer in range(plan.after.num_layers):
        block = Block(plan.after, layer).to(device=weight.device, dtype=weight.dtype)
        source = moved.index(layer) if layer in moved else moved.index(layer - 1)
        block.load_state_dict(model.blocks[source].state_dict())
        block.requires_grad_(False)
        if layer not in moved:
            block.attention.experts.output.zero_()
            block.feedforward.experts.down.zero_()
        blocks.append(block)
    model.blocks = nn.ModuleList(blocks)


def _start_experts(old: nn.Module, new: nn.Module, operation: AddExperts, share_E: Tensor | None, plan: Plan) -> None:
    """Inner matrices as `initial` says; output matrices zero, so that growth is the identity."""
    assert isinstance(new, AttentionExperts | FeedForwardExperts)
    draw_experts(new, plan.before.init, plan.before.num_layers)
    (old_inner, _), (new_inner, new_outer) = old.parameters(), new.parameters()
    new_outer.zero_()
    width = min(old_inner.shape[2], new_inner.shape[2])
    if operation.initial == "mean":
        new_inner[:, :, :width] = old_inner.mean(0)[:, :width]
    elif operation.initial == "copy_most_used":
        busiest = (
            torch.arange(old_inner.shape[0])
            if share_E is None
            else share_E[: old_inner.shape[0]].argsort(descending=True, stable=True)
        )
        chosen = busiest[torch.arange(new_inner.shape[0]) % busiest.shape[0]]
        new_inner[:, :, :width] = old_inner[chosen.to(old_inner.device)][:, :, :width]


def _start_router(router: nn.Module | None, operation: AddExperts) -> None:
    if isinstance(router, RouterRows):
        nn.init.normal_(router.weight, std=STD)
        nn.init.constant_(router.bias, operation.new_router_bias)
    elif isinstance(router, Router):
        router.reset_parameters(STD)


@torch.inference_mode()
def measure_usage(model: ModuleFormer, input_ids: Tensor, document_starts: Tensor | None = None) -> dict[Site, Tensor]:
    """Share of tokens each base expert serves on `input_ids` (B, T), per site (sums to K)."""
    routings = model(input_ids, document_starts=document_starts).routings
    return {
        each.site: torch.bincount(each.experts_MK.flatten(), minlength=each.num_experts) / each.experts_MK.shape[0]
        for each in routings
        if each.generation == 0
    }
