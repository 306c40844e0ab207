"""Losses of a ModuleFormer; padding tokens never count.

Source: arXiv 2306.04640, equations 3-5 (`mi`); the published configs' alternative (`switch`).
A router with a null choice (mode side) is balanced over its experts alone, given that one is
chosen: how often the choice is null is for the language loss to decide.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from mfext.config import RoutingLoss
from mfext.model.router import Routing
from mfext_kernels.cross_entropy import cross_entropy

IGNORED = -100
# The published code's guard against log 0: it adds E * 1e-8 nats to a router's loss and keeps its gradient finite.
ENTROPY_EPS = 1e-8


def language_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token over targets that are not -100 (scalar)."""
    return cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def routing_loss(routings: Iterable[Routing], valid_N: Tensor | None, kind: RoutingLoss) -> Tensor:
    """Sum over routers of the balance loss in nats (scalar). `valid_N`: True where a token counts."""
    losses = [
        _mutual_information(*_weigh(routing, valid_N)) if kind == "mi" else _switch(routing, valid_N)
        for routing in routings
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def concentration_loss(routings: Iterable[Routing], valid_N: Tensor | None) -> Tensor:
    """Sum over routers of the marginal entropy H(e) in nats: minimised, mass moves to few experts.

    The paper names a load-concentration loss without giving it; this is mfext's formulation.
    """
    losses = []
    for routing in routings:
        log_probs_ME, weight_M = _weigh(routing, valid_N)
        losses.append(_entropy((log_probs_ME.exp() * weight_M[:, None]).sum(0)))
    return torch.stack(losses).sum() if losses else torch.zeros(())


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * (probs + ENTROPY_EPS).log()).sum(-1)


def _weigh(routing: Routing, valid_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the experts (M, E) and weights (M) that sum to one over the tokens that count."""
    log_probs_ME = routing.expert_log_probs_ME
    if valid_N is None:
        weight_M = log_probs_ME.new_ones(log_probs_ME.shape[0])
    else:
        flat_N = valid_N.flatten()
        weight_M = (flat_N if routing.tokens_M is None else flat_N[routing.tokens_M]).to(log_probs_ME.dtype)
    return log_probs_ME, weight_M / weight_M.sum().clamp_min(1.0)


def _mutual_information(log_probs_ME: Tensor, weight_M: Tensor) -> Tensor:
    probs_ME = log_probs_ME.exp()
    conditional = -((probs_ME * log_probs_ME).sum(-1) * weight_M).sum()
    return conditional - _entropy((probs_ME * weight_M[:, None]).sum(0))


def _switch(routing: Routing, valid_N: Tensor | None) -> Tensor:
    log_probs_ME, weight_M = _weigh(routing, valid_N)
    probability_E = (log_probs_ME.exp() * weight_M[:, None]).sum(0)
    # Counts are float32 whatever the model's dtype, as published: exact to 2**24 tokens, which bfloat16 is not to 2**8.
    chosen_E = torch.zeros_like(probability_E, dtype=torch.float32)
    experts_MK = routing.experts_MK
    counts_MK = (weight_M > 0)[:, None] & (experts_MK < routing.num_experts)
    chosen_E.index_add_(0, experts_MK.clamp_max(routing.num_experts - 1).flatten(), counts_MK.float().flatten())
    share = (F.normalize(probability_E, p=1, dim=0) * F.normalize(chosen_E, p=1, dim=0)).sum()
    z = (torch.logsumexp(routing.logits_ME, dim=-1) ** 2 * weight_M).sum()
    return routing.num_experts * share + 0.1 * z
