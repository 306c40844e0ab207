"""Which experts the tokens used: shares, gate mass, contribution, entropy, dead and hot experts, share to new experts.

Sums are kept per bank and generation (E numbers each), so memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mfext.conversion import from_mapping

# An expert is dead that gets less than this share of what an even split would give it.
DEAD_BELOW = 0.1
# An expert is hot that gets more than this many times its even share. With K of E experts a token none can get more
# than E / K times: three times, the usual alarm, no expert of a bank of 6 with K = 2 could ever pass.
HOT_ABOVE = 2.0
Criterion = Literal["usage", "gate_mass", "contribution"]


class SiteLike(Protocol):
    """The address of a bank."""

    @property
    def layer(self) -> int: ...
    @property
    def kind(self) -> str: ...


class RoutingLike(Protocol):
    """What is read of a routing (mfext.model.router.Routing): the decision for M tokens of E experts.

    An entry of `experts_MK` equal to E is a null choice: no expert. `output_norms_MK` is None where nobody observed.
    """

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
    @property
    def output_norms_MK(self) -> Tensor | None: ...


BankKey = tuple[int, str, int]


@dataclass(frozen=True)
class BankUsage:
    """One router's decisions: generation 0 is the base's softmax, others are gated or side generations.

    `share[e]`: share of all choices (token, k) of an expert that fell on e, sums to 1. `gate_mass[e]`: mean gate given
    to e per token routed here. `entropy_nats`: of `share`; log E is even. `dead_experts`: share < 0.1 / E,
    `hot_experts`: share > 2 / E. `contribution[e]`: mean per token routed here of gate times the L2 norm of e's output
    before it, 0 for a token that did not choose e; a generation's domain gate is not in it. None without output norms.
    `tokens`: valid tokens routed here: with a null choice (mode side), those that chose any expert. `share_new`: share
    of ALL valid tokens that reached an expert of a growth here. `share_null`: of the choices made here, the null ones.
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
    share_null: float = 0.0
    hot_experts: int = 0
    contribution: tuple[float, ...] | None = None

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

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "usage") -> Usage:
        """What `to_json` wrote. Raises InputError, with `where` in it, for anything else."""
        plain = from_mapping(_PlainUsage, data, where)
        return cls(plain.tokens, plain.banks, {(site.layer, site.kind): site.share_new for site in plain.sites})


@dataclass(frozen=True)
class _SiteShare:
    layer: int
    kind: str
    share_new: float


@dataclass(frozen=True)
class _PlainUsage:
    tokens: int
    banks: tuple[BankUsage, ...]
    sites: tuple[_SiteShare, ...]


def scores(usage: Usage, criterion: Criterion) -> dict[BankKey, tuple[float, ...]]:
    """How much every expert matters on a text, by bank and generation: higher is more.

    `usage` is the share of a bank's choices, `gate_mass` and `contribution` are as in BankUsage. ValueError for
    `contribution` where nobody observed the experts' outputs.
    """
    found: dict[BankKey, tuple[float, ...]] = {}
    for bank in usage.banks:
        by_criterion = {"usage": bank.share, "gate_mass": bank.gate_mass, "contribution": bank.contribution}
        values = by_criterion[criterion]
        if values is None:
            raise ValueError("contribution: count the usage of a model inside observing(model)")
        found[bank.key] = values
    return found


@dataclass
class _Sums:
    chosen_E: Tensor
    mass_E: Tensor
    tokens: Tensor
    new_tokens: Tensor
    null_choices: Tensor
    contribution_E: Tensor | None


class UsageCounter:
    """Adds up routings, batch by batch.

    `base_experts` gives the number of the base's own experts per kind ("attention", "feedforward"), one for all layers
    or one a layer: in generation 0, experts numbered from there on belong to competing growths. Left out, all of
    generation 0 counts as the base's.
    """

    def __init__(self, base_experts: Mapping[str, int | Sequence[int]] | None = None) -> None:
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
        base = 0 if routing.generation else self._num_base(routing)
        return ((experts_MK >= base) & (experts_MK < routing.num_experts)).any(dim=-1)

    def _num_base(self, routing: RoutingLike) -> int:
        counts = self._base_experts.get(routing.site.kind, routing.num_experts)
        return counts if isinstance(counts, int) else counts[routing.site.layer]

    def _add(self, routing: RoutingLike, valid_M: Tensor, new_M: Tensor) -> None:
        key = (routing.site.layer, routing.site.kind, routing.generation)
        real_MK = routing.experts_MK < routing.num_experts
        null_choices = (valid_M[:, None] & ~real_MK).sum()
        valid_M = valid_M & real_MK.any(dim=-1)
        experts_R = routing.experts_MK.clamp_max(routing.num_experts - 1).flatten()
        weight_R = (valid_M[:, None] & real_MK).flatten().double()
        chosen_E = weight_R.new_zeros(routing.num_experts).index_add_(0, experts_R, weight_R)
        mass_R = routing.gates_MK.flatten().double() * weight_R
        mass_E = weight_R.new_zeros(routing.num_experts).index_add_(0, experts_R, mass_R)
        norms_MK, contribution_E = routing.output_norms_MK, None
        if norms_MK is not None:
            contribution_R = norms_MK.flatten().double() * mass_R
            contribution_E = weight_R.new_zeros(routing.num_experts).index_add_(0, experts_R, contribution_R)
        sums = self._sums.get(key)
        if sums is None:
            self._sums[key] = _Sums(chosen_E, mass_E, valid_M.sum(), new_M.sum(), null_choices, contribution_E)
            return
        assert sums.chosen_E.shape == chosen_E.shape, f"the number of experts of {key} changed while counting"
        # Out of place: a counter may start under inference mode and go on outside of it.
        sums.chosen_E = sums.chosen_E + chosen_E
        sums.mass_E = sums.mass_E + mass_E
        sums.tokens = sums.tokens + valid_M.sum()
        sums.new_tokens = sums.new_tokens + new_M.sum()
        sums.null_choices = sums.null_choices + null_choices
        assert (sums.contribution_E is None) == (contribution_E is None), f"{key} was observed only some of the time"
        if sums.contribution_E is not None and contribution_E is not None:
            sums.contribution_E = sums.contribution_E + contribution_E

    def usage(self) -> Usage:
        """What was counted so far."""
        tokens = int(self._tokens)
        banks = tuple(_bank_usage(key, sums, tokens) for key, sums in self._sums.items())
        sites = {site: int(total) / tokens if tokens else 0.0 for site, total in self._new_by_site.items()}
        return Usage(tokens, banks, sites)


def _bank_usage(key: BankKey, sums: _Sums, tokens: int) -> BankUsage:
    chosen_E, num_experts, routed = sums.chosen_E, sums.chosen_E.numel(), int(sums.tokens)
    null_choices, choices = int(sums.null_choices), float(sums.chosen_E.sum())
    share_E = chosen_E / chosen_E.sum().clamp_min(1)
    entropy = -torch.xlogy(share_E, share_E).sum()
    dead, hot = (share_E < DEAD_BELOW / num_experts).sum(), (share_E > HOT_ABOVE / num_experts).sum()
    contribution_E = None if sums.contribution_E is None else sums.contribution_E / max(routed, 1)
    return BankUsage(
        *key,
        tokens=routed,
        share=tuple(share_E.tolist()),
        gate_mass=tuple((sums.mass_E / max(routed, 1)).tolist()),
        entropy_nats=max(0.0, float(entropy)),
        dead_experts=int(dead),
        share_new=int(sums.new_tokens) / tokens if tokens else 0.0,
        share_null=null_choices / (choices + null_choices) if null_choices else 0.0,
        hot_experts=int(hot),
        contribution=None if contribution_E is None else tuple(contribution_E.tolist()),
    )
