"""Which experts the tokens used: shares, gate mass, entropy, dead experts, share to new experts, drift.

Sums are kept per bank and generation (E numbers each), so memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# An expert is dead that gets less than this share of what an even split would give it.
DEAD_BELOW = 0.1


class SiteLike(Protocol):
    """The address of a bank."""

    @property
    def layer(self) -> int: ...
    @property
    def kind(self) -> str: ...


class RoutingLike(Protocol):
    """What is read of a routing (mfext.model.router.Routing): the decision for M tokens of E experts."""

    @property
    def site(self) -> SiteLike: ...
    @property
    def generation(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def experts_MK(self) -> Tensor: ...
    @property
    def gates_MK(self) -> Tensor: ...
    @property
    def tokens_M(self) -> Tensor | None: ...


BankKey = tuple[int, str, int]


@dataclass(frozen=True)
class BankUsage:
    """One router's decisions: generation 0 is the base's softmax, others are gated generations.

    `share[e]`: share of all choices (token, k) that fell on expert e, sums to 1. `gate_mass[e]`: mean gate given to e
    per token routed here. `entropy_nats`: of `share`; log E is even. `dead_experts`: share < 0.1 / E.
    `tokens`: valid tokens routed here. `share_new`: share of ALL valid tokens that reached an expert of a growth here.
    """

    layer: int
    kind: str
    generation: int
    tokens: int
    share: tuple[float, ...]
    gate_mass: tuple[float, ...]
    entropy_nats: float
    dead_experts: int
    share_new: float

    @property
    def key(self) -> BankKey:
        """(layer, kind, generation)."""
        return self.layer, self.kind, self.generation


@dataclass(frozen=True)
class Usage:
    """Expert usage on one text of `tokens` valid tokens, banks in order of first appearance."""

    tokens: int
    banks: tuple[BankUsage, ...]
    share_new_by_site: Mapping[tuple[int, str], float]

    @property
    def share_new(self) -> float | None:
        """Mean over sites of the share of tokens that reached a new expert; None without sites."""
        shares = self.share_new_by_site.values()
        return math.fsum(shares) / len(shares) if shares else None

    def to_json(self) -> dict[str, Any]:
        """One plain JSON object."""
        sites = [
            {"layer": layer, "kind": kind, "share_new": share}
            for (layer, kind), share in self.share_new_by_site.items()
        ]
        return {"tokens": self.tokens, "banks": [asdict(bank) for bank in self.banks], "sites": sites}


@dataclass
class _Sums:
    chosen_E: Tensor
    mass_E: Tensor
    tokens: Tensor
    new_tokens: Tensor


class UsageCounter:
    """Adds up routings, batch by batch.

    `base_experts` gives the number of the base's own experts per kind ("attention", "feedforward"): in generation 0,
    experts numbered from there on belong to competing growths. Left out, all of generation 0 counts as the base's.
    """

    def __init__(self, base_experts: Mapping[str, int] | None = None) -> None:
        self._base_experts = dict(base_experts or {})
        self._sums: dict[BankKey, _Sums] = {}
        self._new_by_site: dict[tuple[int, str], Tensor] = {}
        self._tokens = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, routings: Iterable[RoutingLike], valid: Tensor) -> None:
        """Count the tokens where `valid` (B, T) or (N,) is true; routings of other tokens are ignored."""
        valid_N = valid.flatten().bool()
        self._tokens = self._tokens.to(valid_N.device) + valid_N.sum()
        new_by_site: dict[tuple[int, str], Tensor] = {}
        for routing in routings:
            site = (routing.site.layer, routing.site.kind)
            tokens_M = routing.tokens_M
            valid_M = valid_N if tokens_M is None else valid_N[tokens_M]
            new_M = valid_M & self._reaches_new(routing)
            self._add(routing, valid_M, new_M)
            new_N = new_by_site.setdefault(site, torch.zeros_like(valid_N))
            if tokens_M is None:
                new_N |= new_M
            else:
                new_N[tokens_M] |= new_M
        for site, new_N in new_by_site.items():
            total = new_N.sum()
            self._new_by_site[site] = self._new_by_site[site] + total if site in self._new_by_site else total

    def _reaches_new(self, routing: RoutingLike) -> Tensor:
        experts_MK = routing.experts_MK
        base = 0 if routing.generation else self._base_experts.get(routing.site.kind, routing.num_experts)
        return (experts_MK >= base).any(dim=-1)

    def _add(self, routing: RoutingLike, valid_M: Tensor, new_M: Tensor) -> None:
        key = (routing.site.layer, routing.site.kind, routing.generation)
        experts_R = routing.experts_MK.flatten()
        weight_R = valid_M[:, None].expand_as(routing.experts_MK).flatten().double()
        chosen_E = weight_R.new_zeros(routing.num_experts).index_add_(0, experts_R, weight_R)
        mass_R = routing.gates_MK.flatten().double() * weight_R
        mass_E = weight_R.new_zeros(routing.num_experts).index_add_(0, experts_R, mass_R)
        sums = self._sums.get(key)
        if sums is None:
            self._sums[key] = _Sums(chosen_E, mass_E, valid_M.sum(), new_M.sum())
            return
        assert sums.chosen_E.shape == chosen_E.shape, f"the number of experts of {key} changed while counting"
        # Out of place: a counter may start under inference mode and go on outside of it.
        sums.chosen_E = sums.chosen_E + chosen_E
        sums.mass_E = sums.mass_E + mass_E
        sums.tokens = sums.tokens + valid_M.sum()
        sums.new_tokens = sums.new_tokens + new_M.sum()

    def usage(self) -> Usage:
        """What was counted so far."""
        tokens = int(self._tokens)
        banks = tuple(_bank_usage(key, sums, tokens) for key, sums in self._sums.items())
        sites = {site: int(total) / tokens if tokens else 0.0 for site, total in self._new_by_site.items()}
        return Usage(tokens, banks, sites)


def _bank_usage(key: BankKey, sums: _Sums, tokens: int) -> BankUsage:
    chosen_E, num_experts, routed = sums.chosen_E, sums.chosen_E.numel(), int(sums.tokens)
    share_E = chosen_E / chosen_E.sum().clamp_min(1)
    entropy = -torch.xlogy(share_E, share_E).sum()
    dead = int((share_E < DEAD_BELOW / num_experts).sum())
    return BankUsage(
        *key,
        tokens=routed,
        share=tuple(share_E.tolist()),
        gate_mass=tuple((sums.mass_E / max(routed, 1)).tolist()),
        entropy_nats=max(0.0, float(entropy)),
        dead_experts=dead,
        share_new=int(sums.new_tokens) / tokens if tokens else 0.0,
    )


def jensen_shannon(p: Iterable[float], q: Iterable[float]) -> float:
    """Jensen-Shannon divergence of two distributions in nats, 0 (equal) to log 2 (disjoint).

    The shorter one is filled with zeros: experts that a growth added had no share before.
    """
    p_E, q_E = (torch.tensor(list(share), dtype=torch.float64) for share in (p, q))
    num_experts = max(p_E.numel(), q_E.numel())
    p_E, q_E = (torch.nn.functional.pad(share_E, (0, num_experts - share_E.numel())) for share_E in (p_E, q_E))
    mean_E = (p_E + q_E) / 2
    divergence = sum((torch.xlogy(share_E, share_E) - torch.xlogy(share_E, mean_E)).sum() / 2 for share_E in (p_E, q_E))
    return min(max(float(divergence), 0.0), math.log(2))


def routing_drift(before: Usage, after: Usage) -> dict[BankKey, float | None]:
    """Jensen-Shannon drift in nats of every bank of `after`; None where either side routed no token there."""
    known = {bank.key: bank for bank in before.banks if bank.tokens}
    return {
        bank.key: jensen_shannon(known[bank.key].share, bank.share) if bank.tokens and bank.key in known else None
        for bank in after.banks
    }
