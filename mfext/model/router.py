"""Which experts a token uses, and with what gates: decided here, carried as a value.

Source: arXiv 2306.04640, section 2; the gates are softmax probabilities over all experts and
are not renormalised over the chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.config import RouterKind
from mfext_kernels.routing import Dispatch, make_dispatch

SiteKind = Literal["attention", "feedforward"]


@dataclass(frozen=True)
class Site:
    """The address of a bank: layer number and kind."""

    layer: int
    kind: SiteKind

    def __str__(self) -> str:
        return f"layer {self.layer} {self.kind}"


@dataclass(frozen=True)
class Routing:
    """One site's decision for M tokens, immutable.

    `generation` is 0 for the base's softmax (competing generations route inside it, their
    experts numbered after the base's) and the 1-based number of a gated generation otherwise.
    `tokens_M` holds the flat indices (b*T + t) of the tokens decided for; None means all N.
    Log-probabilities and logits are over all E experts of this softmax, before top-k.
    """

    site: Site
    generation: int
    experts_MK: Tensor
    gates_MK: Tensor
    log_probs_ME: Tensor
    logits_ME: Tensor
    tokens_M: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits_ME.shape[-1]

    @cached_property
    def dispatch(self) -> Dispatch:
        """The tokens sorted by expert, once asked for: a decoding step never does."""
        return make_dispatch(self.experts_MK, self.num_experts)


def route(
    logits_ME: Tensor, num_chosen: int, site: Site, generation: int = 0, tokens_M: Tensor | None = None
) -> Routing:
    """Choose the `num_chosen` most probable experts of every token."""
    log_probs_ME = F.log_softmax(logits_ME, dim=-1)
    top_log_probs_MK, experts_MK = log_probs_ME.topk(num_chosen, dim=-1)
    return Routing(site, generation, experts_MK, top_log_probs_MK.exp(), log_probs_ME, logits_ME, tokens_M)


class RouterRows(nn.Module):
    """Rows a competing generation adds to a softmax: weight (E', G) and bias (E')."""

    def __init__(self, num_features: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, num_features))
        self.bias = nn.Parameter(torch.zeros(num_experts))


class Router(nn.Module):
    """Scores of E experts for each token.

    `mlp`: W2 gelu(W1 x + b1), W2 without bias. `linear`: one bias-free matrix. `gmm`: cosine
    similarity of a bias-free projection with E centroids, times exp(temperature).
    """

    def __init__(self, kind: RouterKind, d_model: int, d_router: int, num_experts: int) -> None:
        super().__init__()
        self.kind = kind
        self.num_features = d_model if kind == "linear" else d_router
        if kind == "mlp":
            self.hidden = nn.Linear(d_model, d_router)
        if kind == "gmm":
            self.projection = nn.Linear(d_model, d_router, bias=False)
            self.centroids = nn.Parameter(torch.empty(num_experts, d_router))
            self.temperature = nn.Parameter(torch.empty(()))
        else:
            self.output = nn.Linear(self.num_features, num_experts, bias=False)

    def reset_parameters(self, std: float) -> None:
        """Draw weights N(0, std), biases 0; gmm centroids N(0, 1), temperature log 2."""
        for linear in (module for module in self.children() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.kind == "gmm":
            nn.init.normal_(self.centroids)
            nn.init.constant_(self.temperature, 0.6931471805599453)

    def forward(self, x_ND: Tensor, extra: Sequence[RouterRows] = ()) -> Tensor:
        """Logits (N, E + rows of `extra`, in order)."""
        if self.kind == "mlp":
            features_NG = F.gelu(self.hidden(x_ND))
            logits_NE: Tensor = self.output(features_NG)
        elif self.kind == "gmm":
            features_NG = F.normalize(self.projection(x_ND), dim=-1)
            logits_NE = features_NG @ F.normalize(self.centroids, dim=-1).T * self.temperature.exp()
        else:
            features_NG = x_ND
            logits_NE = self.output(x_ND)
        if not extra:
            return logits_NE
        return torch.cat([logits_NE, *(F.linear(features_NG, rows.weight, rows.bias) for rows in extra)], dim=-1)
