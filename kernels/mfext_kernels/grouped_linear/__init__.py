"""Per-expert matrix products over rows sorted by expert: contract and choice of implementation.

Weights come as a sequence of stacks (E_g, rows, columns), one per generation; experts are numbered
consecutively over the stacks, which are never concatenated, so a frozen stack costs no gradient.
Shapes: N tokens, K chosen experts, R = N*K routed rows, D in, F out. fp32, float64 and bf16
(bf16 accumulates in fp32). Under autocast everything is cast to the autocast dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mfext_kernels.backends import Backend, choose
from mfext_kernels.grouped_linear import cpu, one_token, reference
from mfext_kernels.routing import Dispatch

__all__ = ["expert_feedforward", "gather_linear", "one_token", "order_rows", "scatter_linear", "sort_rows"]


def gather_linear(
    x_ND: Tensor, weights: Sequence[Tensor], dispatch: Dispatch, backend: Backend | None = None
) -> Tensor:
    """Each token's row times the matrices (E_g, D, F) of its chosen experts -> rows_RF sorted by expert."""
    _check(weights, dispatch, x_ND.shape[-1])
    _check_rows("x_ND", x_ND, dispatch.num_tokens)
    x_ND, *weights = _one_dtype(x_ND, *weights)
    rows_RF: Tensor = _implementation(backend, x_ND).gather_linear(x_ND, weights, dispatch)
    return rows_RF


def scatter_linear(
    rows_RF: Tensor, weights: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch, backend: Backend | None = None
) -> Tensor:
    """Sorted rows times their expert's matrix (E_g, F, D), times the gate, summed over K -> y_ND."""
    _check(weights, dispatch, rows_RF.shape[-1])
    _check_rows("rows_RF", rows_RF, dispatch.num_tokens * dispatch.num_chosen)
    _check_gates(gates_NK, dispatch)
    rows_RF, gates_NK, *weights = _one_dtype(rows_RF, gates_NK, *weights)
    y_ND: Tensor = _implementation(backend, rows_RF).scatter_linear(rows_RF, weights, gates_NK, dispatch)
    return y_ND


def expert_feedforward(
    x_ND: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gates_NK: Tensor,
    dispatch: Dispatch,
    backend: Backend | None = None,
) -> Tensor:
    """The whole expert layer, sum_k gate * gelu_tanh(x U_e) V_e: U (E_g, D, F), V (E_g, F, D) -> y_ND."""
    _check(up, dispatch, x_ND.shape[-1])
    _check(down, dispatch, up[0].shape[-1])
    if [weight.shape[0] for weight in up] != [weight.shape[0] for weight in down]:
        raise ValueError(f"up, down: must be cut into the same stacks, not {len(up)} and {len(down)}")
    _check_rows("x_ND", x_ND, dispatch.num_tokens)
    _check_gates(gates_NK, dispatch)
    x_ND, gates_NK, *stacks = _one_dtype(x_ND, gates_NK, *up, *down)
    y_ND: Tensor = _implementation(backend, x_ND).expert_feedforward(
        x_ND, stacks[: len(up)], stacks[len(up) :], gates_NK, dispatch
    )
    return y_ND


def order_rows(rows_RF: Tensor, dispatch: Dispatch, backend: Backend | None = None) -> Tensor:
    """Sorted rows (R, F) -> token order (N, K, F)."""
    _check_rows("rows_RF", rows_RF, dispatch.num_tokens * dispatch.num_chosen)
    rows_NKF: Tensor = _implementation(backend, rows_RF).order_rows(rows_RF, dispatch)
    return rows_NKF


def sort_rows(rows_NKF: Tensor, dispatch: Dispatch, backend: Backend | None = None) -> Tensor:
    """Token order (N, K, F) -> sorted rows (R, F); the inverse of `order_rows`."""
    if rows_NKF.shape[:2] != (dispatch.num_tokens, dispatch.num_chosen):
        raise ValueError(
            f"rows_NKF: must be ({dispatch.num_tokens}, {dispatch.num_chosen}, F), not {tuple(rows_NKF.shape)}"
        )
    rows_RF: Tensor = _implementation(backend, rows_NKF).sort_rows(rows_NKF, dispatch)
    return rows_RF


def _implementation(backend: Backend | None, rows: Tensor) -> ModuleType:
    chosen = choose(backend, rows)
    if chosen == "triton":
        from mfext_kernels.grouped_linear import triton

        return triton
    return reference if chosen == "reference" else cpu


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Everything in one dtype: autocast's where it is on, else the first tensor's (gates often come in fp32)."""
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[0].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check(weights: Sequence[Tensor], dispatch: Dispatch, width: int) -> None:
    stacked = sum(weight.shape[0] for weight in weights)
    if stacked != dispatch.num_experts:
        raise ValueError(
            f"weights: {stacked} experts in {len(weights)} stacks, but the dispatch names {dispatch.num_experts}"
        )
    for weight in weights:
        if weight.dim() != 3 or weight.shape[1] != width:
            raise ValueError(f"weights: each stack must be (experts, {width}, columns), not {tuple(weight.shape)}")


def _check_rows(name: str, rows: Tensor, num_rows: int) -> None:
    if rows.dim() != 2 or rows.shape[0] != num_rows:
        raise ValueError(f"{name}: must be 2-D with {num_rows} rows for this dispatch, not {tuple(rows.shape)}")


def _check_gates(gates_NK: Tensor, dispatch: Dispatch) -> None:
    if gates_NK.shape != (dispatch.num_tokens, dispatch.num_chosen):
        raise ValueError(
            f"gates_NK: must be ({dispatch.num_tokens}, {dispatch.num_chosen}), not {tuple(gates_NK.shape)}"
        )
