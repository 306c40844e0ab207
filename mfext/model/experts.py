"""Expert weights of one site and one generation, and how tokens pass through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfext.model.router import Routing
from mfext_kernels.grouped_linear import expert_feedforward, gather_linear, order_rows, scatter_linear, sort_rows


class AttentionExperts(nn.Module):
    """E attention experts: query projections (E, D, A) and output projections (E, A, D)."""

    def __init__(self, num_experts: int, d_model: int, d_attention: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_experts, d_model, d_attention))
        self.output = nn.Parameter(torch.empty(num_experts, d_attention, d_model))


class FeedForwardExperts(nn.Module):
    """E feed-forward experts: up (E, D, F) and down (E, F, D) projections around a tanh-gelu."""

    def __init__(self, num_experts: int, d_model: int, d_feedforward: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, d_model, d_feedforward))
        self.down = nn.Parameter(torch.empty(num_experts, d_feedforward, d_model))


def project_queries(x_MD: Tensor, stacks: Sequence[AttentionExperts], routing: Routing) -> Tensor:
    """Queries (M, K, A) of every chosen expert, in order of falling gate."""
    return order_rows(gather_linear(x_MD, [stack.query for stack in stacks], routing.dispatch), routing.dispatch)


def mix_outputs(o_MKA: Tensor, stacks: Sequence[AttentionExperts], routing: Routing) -> Tensor:
    """Outputs (M, D): each expert's output projection times its gate, summed over the K chosen."""
    rows_RA = sort_rows(o_MKA, routing.dispatch)
    return scatter_linear(rows_RA, [stack.output for stack in stacks], routing.gates_MK, routing.dispatch)


def mix_feedforward(x_MD: Tensor, stacks: Sequence[FeedForwardExperts], routing: Routing) -> Tensor:
    """sum over chosen e of gate_e * down_e(gelu(up_e(x))), (M, D)."""
    return expert_feedforward(
        x_MD,
        [stack.up for stack in stacks],
        [stack.down for stack in stacks],
        routing.gates_MK,
        routing.dispatch,
    )
