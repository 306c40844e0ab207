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
from mfext.model.linear import Linear
from mfext_kernels.products import linear
from mfext_kernels.routing import Dispatch, make_dispatch, top_k

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

    `generation` is 0 for the base's softmax (generations of mode compete and preserve route inside
    it, their experts numbered after the base's) and the 1-based number of a gated or side
    generation otherwise. `tokens_M` holds the flat indices (b*T + t) of the tokens decided for;
    None means all N. Log-probabilities and logits are over all E experts of this softmax, before
    top-k. With `has_null` their last column is the null choice, in `experts_MK` the number E:
    no expert, nothing computed, nothing added. `output_norms_MK`, in an observed pass (see
    observing.py) only: the L2 norm of every chosen expert's output before its gate.
    """

    site: Site
    generation: int
    experts_MK: Tensor
    gates_MK: Tensor
    log_probs_ME: Tensor
    logits_ME: Tensor
    tokens_M: Tensor | None = None
    has_null: bool = False
    output_norms_MK: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, without the null choice."""
        return self.logits_ME.shape[-1] - self.has_null

    @property
    def expert_log_probs_ME(self) -> Tensor:
        """Log-probabilities over the E experts alone: given that the choice is not the null one."""
        return F.log_softmax(self.logits_ME[:, : self.num_experts], dim=-1) if self.has_null else self.log_probs_ME

    @cached_property
    def dispatch(self) -> Dispatch:
        """The tokens sorted by expert, once asked for: a decoding step never does."""
        assert not self.has_null, "null choices are not dispatched: see without_null"
        return make_dispatch(self.experts_MK, self.num_experts)


def route(
    logits_ME: Tensor,
    num_chosen: int,
    site: Site,
    generation: int = 0,
    tokens_M: Tensor | None = None,
    has_null: bool = False,
) -> Routing:
    """Choose the `num_chosen` most probable experts of every token; with `has_null` the last column is one of them."""
    log_probs_ME = F.log_softmax(logits_ME, dim=-1)
    top_log_probs_MK, experts_MK = top_k(log_probs_ME, num_chosen)
    return Routing(site, generation, experts_MK, top_log_probs_MK.exp(), log_probs_ME, logits_ME, tokens_M, has_null)


def route_preserving(logits_ME: Tensor, stack_sizes: Sequence[int], num_chosen: int, site: Site) -> Routing:
    """Choose among all experts as one softmax ranks them; gate each as if nothing newer existed.

    The gates of stack n (`stack_sizes` experts: the base's, then each generation's) are softmax
    probabilities over the stacks 0 .. n. An old expert's gate is then, bit for bit, what it was
    before growth: experts are ranked by the joint logits measured from the base's own normaliser,
    so that rounding cannot order old ones anew. The K gates may sum to more than 1.
    """
    base_MB = logits_ME[:, : stack_sizes[0]]
    base_log_probs_MB = F.log_softmax(base_MB, dim=-1)
    with torch.no_grad():
        newer = logits_ME[:, stack_sizes[0] :] - base_MB.logsumexp(-1, keepdim=True)
        _, experts_MK = top_k(torch.cat([base_log_probs_MB, newer], dim=-1), num_chosen)
    log_gates, end = [base_log_probs_MB], stack_sizes[0]
    log_probs_ME = base_log_probs_MB
    for size in stack_sizes[1:]:
        log_probs_ME = F.log_softmax(logits_ME[:, : end + size], dim=-1)
        log_gates.append(log_probs_ME[:, end:])
        end += size
    gates_MK = torch.cat(log_gates, dim=-1).gather(-1, experts_MK).exp()
    return Routing(site, 0, experts_MK, gates_MK, log_probs_ME, logits_ME)


@dataclass(frozen=True)
class Chosen:
    """The choices of a routing that are experts, as R rows of one expert each, in order of token.

    Row r is choice `slots_R[r]` of token `rows_R[r]` of `num_tokens`, the slots of a token counted from 0 without gaps.
    """

    num_tokens: int
    rows_R: Tensor
    slots_R: Tensor
    routing: Routing

    @cached_property
    def num_slots(self) -> int:
        """The most experts any token uses."""
        return int(self.slots_R.max()) + 1 if self.slots_R.numel() else 0


def without_null(routing: Routing) -> Chosen:
    """Only the choices that cost something."""
    real_MK = routing.experts_MK < routing.num_experts
    rows_R, _ = real_MK.nonzero(as_tuple=True)
    slots_R = (real_MK.cumsum(1) - 1)[real_MK]
    experts_R1, gates_R1 = (each[real_MK].unsqueeze(1) for each in (routing.experts_MK, routing.gates_MK))
    with torch.no_grad():
        logits_RE = routing.logits_ME[:, : routing.num_experts].index_select(0, rows_R)
        log_probs_RE = routing.expert_log_probs_ME.index_select(0, rows_R)
    own = Routing(routing.site, routing.generation, experts_R1, gates_R1, log_probs_RE, logits_RE, rows_R)
    return Chosen(len(real_MK), rows_R, slots_R, own)


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
            self.hidden = Linear(d_model, d_router)
        if kind == "gmm":
            self.projection = Linear(d_model, d_router, bias=False)
            self.centroids = nn.Parameter(torch.empty(num_experts, d_router))
            self.temperature = nn.Parameter(torch.empty(()))
        else:
            self.output = Linear(self.num_features, num_experts, bias=False)

    def reset_parameters(self, std: float) -> None:
        """Draw weights N(0, std), biases 0; gmm centroids N(0, 1), temperature log 2."""
        for layer in (module for module in self.children() if isinstance(module, nn.Linear)):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
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
        return torch.cat([logits_NE, *(linear(features_NG, rows.weight, rows.bias) for rows in extra)], dim=-1)
