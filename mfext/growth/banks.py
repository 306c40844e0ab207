"""The banks of a model by (layer, kind, generation; 0 is the base): how large they are and where their tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mfext.config import GenerationConfig, ModelConfig
from mfext.model.moduleformer import ModuleFormer

BankKey = tuple[int, str, int]
KINDS = ("attention", "feedforward")


def bank_keys(config: ModelConfig) -> tuple[BankKey, ...]:
    """Every bank that has experts, by layer, then kind, then generation."""
    keys = [
        (layer, kind, generation)
        for layer in range(config.num_layers)
        for kind in KINDS
        for generation in range(len(config.generations) + 1)
    ]
    return tuple(key for key in keys if num_experts(config, key))


def num_experts(config: ModelConfig, key: BankKey) -> int:
    """E of a bank."""
    layer, kind, _ = key
    return _owner(config, key).experts(kind, layer)


def total_experts(config: ModelConfig) -> int:
    """Experts of all banks together."""
    return sum(num_experts(config, key) for key in bank_keys(config))


def fewest_experts(config: ModelConfig, key: BankKey) -> int:
    """How many a bank needs: as many as a token chooses, or all where there are no more."""
    return min(_owner(config, key).experts_per_token(key[1]), num_experts(config, key))


def expert_parameters(config: ModelConfig, key: BankKey) -> int:
    """Parameters that come and go with one expert of a bank: its two matrices and what its router holds for it."""
    owner = _owner(config, key)
    width = config.d_attention if key[1] == "attention" else owner.d_feedforward
    features = config.d_model if config.router == "linear" else config.d_router
    return 2 * config.d_model * width + features + _joins(owner)


def softmax_banks(config: ModelConfig, key: BankKey) -> tuple[BankKey, ...]:
    """The banks whose experts are numbered through in the softmax that `key` stands in, in their order."""
    layer, kind, _ = key
    if key[2] and not _joins(_owner(config, key)):
        return (key,)
    joined = (number for number, each in enumerate(config.generations, 1) if each.joins_softmax)
    sharing = ((layer, kind, number) for number in (0, *joined))
    return tuple(each for each in sharing if num_experts(config, each))


def shown(config: ModelConfig, key: BankKey) -> str:
    """A bank in words."""
    owner = _owner(config, key)
    return f"layer {key[0]} {key[1]} of {owner.name if isinstance(owner, GenerationConfig) else 'base'}"


def with_experts(config: ModelConfig, counts: Mapping[BankKey, int]) -> ModelConfig:
    """The same config with other counts of experts in the banks given."""
    layers = range(config.num_layers)

    def changed(generation: int) -> dict[str, Any]:
        owner = config.generations[generation - 1] if generation else config
        return {
            f"{kind}_experts": tuple(
                counts.get((layer, kind, generation), owner.experts(kind, layer)) for layer in layers
            )
            for kind in KINDS
        }

    generations = tuple(replace(each, **changed(number)) for number, each in enumerate(config.generations, 1))
    return replace(config, **changed(0), generations=generations)


def router_name(config: ModelConfig, key: BankKey) -> str:
    """The module whose logits hold this bank's experts, from their place in its softmax on."""
    layer, kind, generation = softmax_banks(config, key)[0]
    return (
        f"generations.{generation - 1}.layers.{layer}.{kind}_router" if generation else f"blocks.{layer}.{kind}.router"
    )


def bank_parameters(model: ModuleFormer, key: BankKey) -> dict[str, nn.Parameter]:
    """A bank's tensors by name, one row an expert; in a router with a null choice its row follows theirs."""
    layer, kind, generation = key
    own = "centroids" if model.config.router == "gmm" else "output.weight"
    if generation:
        start = f"generations.{generation - 1}.layers.{layer}.{kind}"
        rows = ("weight", "bias") if _joins(_owner(model.config, key)) else (own,)
        routers = [f"{start}_router.{row}" for row in rows]
    else:
        start = f"blocks.{layer}.{kind}.experts"
        routers = [f"blocks.{layer}.{kind}.router.{own}"]
    matrices = ("query", "output") if kind == "attention" else ("up", "down")
    return {name: model.get_parameter(name) for name in (*(f"{start}.{each}" for each in matrices), *routers)}


def _owner(config: ModelConfig, key: BankKey) -> ModelConfig | GenerationConfig:
    return config.generations[key[2] - 1] if key[2] else config


def _joins(owner: ModelConfig | GenerationConfig) -> bool:
    return isinstance(owner, GenerationConfig) and owner.joins_softmax
