"""Grouped linear maps, written for reading: one expert at a time, plain autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mfext_kernels.routing import Dispatch


def gather_linear(x_ND: Tensor, weights: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    """rows[r] = x[token of r] @ W[expert of r]."""
    return _per_expert(x_ND[dispatch.tokens_R], weights, dispatch)


def scatter_linear(rows_RF: Tensor, weights: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """y[n] = sum_k gate[n, k] * rows[(n, k)] @ W[expert of (n, k)]."""
    y_NKD = order_rows(_per_expert(rows_RF, weights, dispatch), dispatch)
    return (y_NKD * gates_NK.unsqueeze(-1)).sum(1)


def expert_feedforward(
    x_ND: Tensor, up: Sequence[Tensor], down: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch
) -> Tensor:
    """y[n] = sum_k gate[n, k] * gelu_tanh(x[n] @ U) @ V."""
    hidden_RF = F.gelu(gather_linear(x_ND, up, dispatch), approximate="tanh")
    return scatter_linear(hidden_RF, down, gates_NK, dispatch)


def order_rows(rows_RF: Tensor, dispatch: Dispatch) -> Tensor:
    """Sorted rows -> (N, K, F)."""
    return rows_RF[dispatch.inverse_R].view(dispatch.num_tokens, dispatch.num_chosen, *rows_RF.shape[1:])


def sort_rows(rows_NKF: Tensor, dispatch: Dispatch) -> Tensor:
    """(N, K, F) -> sorted rows."""
    return rows_NKF.flatten(0, 1)[dispatch.order_R]


def _per_expert(rows_RF: Tensor, weights: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    matrices = [matrix for weight in weights for matrix in weight]
    parts = torch.split(rows_RF, list(dispatch.sizes))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])
