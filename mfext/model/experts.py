"""Expert weights of one site and one generation, and how tokens pass through them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfext.model.router import Routing
from mfext_kernels.grouped_linear import (
    expert_feedforward,
    gather_linear,
    one_token,
    order_rows,
    scatter_linear,
    sort_rows,
)
from mfext_kernels.grouped_linear.one_token import Matrices
from mfext_kernels.routing import Dispatch


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
    query = [stack.query for stack in stacks]
    if one_token.applies(x_MD, query):
        return one_token.gather_linear(x_MD, Matrices.of(*query), routing.experts_MK.tolist()[0]).unsqueeze(0)
    return order_rows(gather_linear(x_MD, query, routing.dispatch), routing.dispatch)


def mix_outputs(o_MKA: Tensor, stacks: Sequence[AttentionExperts], routing: Routing) -> Tensor:
    """Outputs (M, D): each expert's output projection times its gate, summed over the K chosen."""
    output = [stack.output for stack in stacks]
    if one_token.applies(o_MKA, output):
        return _leave(o_MKA.squeeze(0), output, routing)
    rows_RA = sort_rows(o_MKA, routing.dispatch)
    return scatter_linear(rows_RA, output, routing.gates_MK, routing.dispatch)


def mix_feedforward(x_MD: Tensor, stacks: Sequence[FeedForwardExperts], routing: Routing) -> Tensor:
    """sum over chosen e of gate_e * down_e(gelu(up_e(x))), (M, D)."""
    up, down = [stack.up for stack in stacks], [stack.down for stack in stacks]
    if one_token.applies(x_MD, [*up, *down]):
        hidden_KF = one_token.gather_linear(x_MD, Matrices.of(*up), routing.experts_MK.tolist()[0])
        return _leave(one_token.activate(hidden_KF), down, routing)
    return expert_feedforward(x_MD, up, down, routing.gates_MK, routing.dispatch)


def attention_norms(o_MKA: Tensor, stacks: Sequence[AttentionExperts], routing: Routing) -> Tensor:
    """L2 norms (M, K) of what every chosen expert's output projection makes of its attended values, before the gate."""
    return _norms(sort_rows(o_MKA, routing.dispatch), [stack.output for stack in stacks], routing.dispatch)


def feedforward_norms(x_MD: Tensor, stacks: Sequence[FeedForwardExperts], routing: Routing) -> Tensor:
    """L2 norms (M, K) of down_e(gelu(up_e(x))) of every chosen expert e, before the gate."""
    hidden_RF = F.gelu(gather_linear(x_MD, [stack.up for stack in stacks], routing.dispatch), approximate="tanh")
    return _norms(hidden_RF, [stack.down for stack in stacks], routing.dispatch)


def _norms(rows_RF: Tensor, stacks: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    """Norms (M, K), at least fp32, of sorted rows times their expert's last matrix."""
    sorted_R = torch.arange(rows_RF.shape[0], device=rows_RF.device)
    in_order = Dispatch(sorted_R, sorted_R, sorted_R, dispatch.bounds_E1, len(sorted_R), 1)
    out_RD = gather_linear(rows_RF, stacks, in_order)
    dtype = torch.promote_types(out_RD.dtype, torch.float32)
    norms_R1 = torch.linalg.vector_norm(out_RD, dim=-1, keepdim=True, dtype=dtype)
    return order_rows(norms_R1, dispatch).squeeze(-1)


def _leave(rows_KF: Tensor, stacks: Sequence[Tensor], routing: Routing) -> Tensor:
    """One token's rows through the last matrices of its experts, times its gates, summed."""
    experts, gates = routing.experts_MK.tolist()[0], routing.gates_MK.tolist()[0]
    nothing_1D = rows_KF.new_zeros(1, stacks[0].shape[2])
    return one_token.scatter_linear(nothing_1D, rows_KF, Matrices.of(*stacks), experts, gates)
