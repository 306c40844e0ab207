"""A few numbers that show whether the experts that train are used: one micro-batch's worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mfext.config import ModelConfig
from mfext.model.router import Routing, SiteKind

KINDS: tuple[SiteKind, ...] = ("attention", "feedforward")
ROUTING_COLUMNS = (
    *(f"routing_entropy_{kind}" for kind in KINDS),
    *(f"dead_experts_{kind}" for kind in KINDS),
    "gate_open_share",
    "new_expert_share",
)


class Routed(Protocol):
    """The parts of a model's output these numbers need."""

    @property
    def routings(self) -> tuple[Routing, ...]: ...

    @property
    def gates(self) -> Tensor | None: ...


@torch.no_grad()
def routing_numbers(output: Routed, config: ModelConfig, num_tokens: int) -> dict[str, float]:
    """Of the newest generation (of the base where there is none or it routes in the base's softmax).

    `routing_entropy_KIND`: entropy in nats of the mean routing distribution, mean over layers.
    In mode side the null choice is one of its outcomes.
    `dead_experts_KIND`: experts no token chose, summed over layers. `gate_open_share`: tokens on
    which the newest domain gate is above 0. `new_expert_share`: of all choices at the sites, those
    that went to new experts (compete, preserve), or tokens x layers dispatched to them (gated, side).
    A number that has no meaning here (a closed gate, no generation) is absent.
    """
    newest = config.generations[-1] if config.generations else None
    number = len(config.generations) if newest is not None and not newest.joins_softmax else 0
    watched = [routing for routing in output.routings if routing.generation == number]
    numbers: dict[str, float] = {}
    for kind in KINDS:
        of_kind = [routing for routing in watched if routing.site.kind == kind]
        if of_kind:
            numbers[f"routing_entropy_{kind}"] = sum(_entropy(routing) for routing in of_kind) / len(of_kind)
            numbers[f"dead_experts_{kind}"] = float(sum(size == 0 for routing in of_kind for size in _sizes(routing)))
    if newest is not None and newest.mode == "gated" and output.gates is not None:
        numbers["gate_open_share"] = float((output.gates[..., -1] > 0).double().mean())
    if newest is not None:
        new = [(routing, _new_experts(routing, config)) for routing in watched]
        numbers["new_expert_share"] = _own_router_share(watched, config, num_tokens) if number else _joint_share(new)
    return numbers


def _entropy(routing: Routing) -> float:
    mean_E = routing.log_probs_ME.detach().double().exp().mean(0)
    return float(-torch.xlogy(mean_E, mean_E).sum())


def _sizes(routing: Routing) -> tuple[int, ...]:
    """Choices that fell on each expert, null choices left out."""
    if not routing.has_null:
        return routing.dispatch.sizes
    counts = torch.bincount(routing.experts_MK.flatten(), minlength=routing.num_experts + 1)
    return tuple(counts[: routing.num_experts].tolist())


def _new_experts(routing: Routing, config: ModelConfig) -> int:
    return config.generations[-1].experts(routing.site.kind, routing.site.layer)


def _joint_share(routings: Sequence[tuple[Routing, int]]) -> float:
    total = sum(sum(routing.dispatch.sizes) for routing, _ in routings)
    new = sum(sum(routing.dispatch.sizes[-count:]) for routing, count in routings if count)
    return new / total if total else 0.0


def _own_router_share(routings: Sequence[Routing], config: ModelConfig, num_tokens: int) -> float:
    newest = config.generations[-1]
    sites = sum(count > 0 for count in newest.attention_experts + newest.feedforward_experts)
    dispatched = sum(int((routing.experts_MK < routing.num_experts).any(1).sum()) for routing in routings)
    return dispatched / (sites * num_tokens) if sites and num_tokens else 0.0
