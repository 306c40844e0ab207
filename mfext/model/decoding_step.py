"""One token of one sequence through the base alone, in as few calls as there can be: no generation is open on it.

The same equations as attention.py and feedforward.py, which serve every other case: two tokens or rows, padding, open
generations, gradients, autocast. At one token a step is bound by its calls and by reading the chosen experts' weights
once (12 MB at 16 M parameters), not by arithmetic. So what hangs on the weights alone (views of each expert's, and one
joined copy of the small matrices that multiply the same activations) is prepared once per cache. Like the keys a cache
holds, it is of the weights as they were then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.model.router import Routing, Site, route
from mfext_kernels.grouped_linear import one_token
from mfext_kernels.grouped_linear.one_token import Matrices
from mfext_kernels.stickbreaking import stickbreaking_decode_folded


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """A site's norm, the product all its activations pass first, its router's output, and its experts' matrices.

    `joined` (D, P) with `bias_P` is the router's hidden layer; for attention behind keys and values. `enter` holds
    each expert's first matrix (queries, up), `leave` its last (outputs, down).
    """

    site: Site
    num_chosen: int
    norm: nn.LayerNorm
    joined: Matrices
    bias_P: Tensor
    scores_GE: Tensor
    enter: Matrices
    leave: Matrices

    def start(self, x_1D: Tensor) -> tuple[Tensor, Tensor]:
        """The normed activations (1, D) and their joined product (1, P)."""
        norm = self.norm
        normed_1D = torch.layer_norm(x_1D, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return normed_1D, self.joined.product(normed_1D.view(-1), 0).add_(self.bias_P)

    def choose(self, hidden_1G: Tensor) -> tuple[Routing, list[int], list[float]]:
        """The routing, and its experts and gates as plain numbers."""
        routing = route(torch.mm(F.gelu(hidden_1G), self.scores_GE), self.num_chosen, self.site)
        return routing, routing.experts_MK.tolist()[0], routing.gates_MK.tolist()[0]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What a decoding step reads of one layer."""

    attention: SiteWeights
    feedforward: SiteWeights


def join(*linears: nn.Linear) -> tuple[Matrices, Tensor]:
    """Layers of the same activations as one: a copy of their weights (D, P), and of their biases (P)."""
    weight_DP = torch.cat([linear.weight for linear in linears]).t().contiguous()
    return Matrices.of(weight_DP.unsqueeze(0)), torch.cat([linear.bias for linear in linears])


def attend(x_1D: Tensor, site: SiteWeights, keys_values: Tensor, position: int) -> tuple[Tensor, Routing]:
    """The residual stream after attention; keys and values (2, 1, H, capacity, C) get those of `position`."""
    _, _, heads, _, width = keys_values.shape
    normed_1D, joined_1P = site.start(x_1D)
    both = 2 * heads * width
    new, hidden_1G = joined_1P.split_with_sizes([both, joined_1P.shape[1] - both], 1)
    keys_values.select(3, position).copy_(new.view(2, 1, heads, width))
    routing, experts, gates = site.choose(hidden_1G)
    q_KA = one_token.gather_linear(normed_1D, site.enter, experts)
    q_HKC = q_KA.view(len(experts), heads, width).transpose(0, 1)
    k_HSC, v_HSC = keys_values.squeeze(1).narrow(2, 0, position + 1).unbind()
    o_KA = stickbreaking_decode_folded(q_HKC, k_HSC, v_HSC).transpose(0, 1).reshape(q_KA.shape)
    return one_token.scatter_linear(x_1D, o_KA, site.leave, experts, gates), routing


def feed_forward(x_1D: Tensor, site: SiteWeights) -> tuple[Tensor, Routing]:
    """The residual stream after the feed-forward experts."""
    normed_1D, hidden_1G = site.start(x_1D)
    routing, experts, gates = site.choose(hidden_1G)
    active_KF = one_token.activate(one_token.gather_linear(normed_1D, site.enter, experts))
    return one_token.scatter_linear(x_1D, active_KF, site.leave, experts, gates), routing
