"""Grouped linear maps on a GPU: which kernel is launched on what (triton_kernels.py has the kernels)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mfext_kernels.autograd import applied
from mfext_kernels.backends import on_device_of
from mfext_kernels.grouped_linear.cpu import order_rows, sort_rows
from mfext_kernels.grouped_linear.triton_kernels import (
    back_kernel,
    rows_kernel,
    tiles_kernel,
    weights_kernel,
)
from mfext_kernels.routing import Dispatch
from mfext_kernels.tuning import Config, config_for, kind_of

__all__ = ["expert_feedforward", "gather_linear", "order_rows", "scatter_linear", "sort_rows"]


def gather_linear(x_ND: Tensor, weights: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    """rows[r] = x[token of r] @ W[expert of r]."""
    return applied(_GatherLinear, x_ND, dispatch, *weights)


def scatter_linear(rows_RF: Tensor, weights: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """y[n] = sum_k gate[n, k] * rows[(n, k)] @ W[expert of (n, k)]."""
    return applied(_ScatterLinear, rows_RF, gates_NK, dispatch, *weights)


def expert_feedforward(
    x_ND: Tensor, up: Sequence[Tensor], down: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch
) -> Tensor:
    """y[n] = sum_k gate[n, k] * gelu_tanh(x[n] @ U) @ V."""
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_ND, gates_NK, *up, *down))):
        with on_device_of(x_ND):
            active_RF = _rows(_Rows(x_ND.contiguous(), gathered=True, activate=True), up, dispatch)
            return _scatter(active_RF, down, gates_NK, dispatch)
    return applied(_ExpertFeedforward, x_ND, gates_NK, dispatch, len(up), *up, *down)


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        x_ND = x_ND.contiguous()
        ctx.dispatch = dispatch
        ctx.save_for_backward(x_ND, *weights)
        with on_device_of(x_ND):
            return _rows(_Rows(x_ND, gathered=True), weights, dispatch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *weights = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()
        with on_device_of(x_ND):
            left, right = _Side(x_ND, gathered=True), _Side(grad_RF)
            grads = _grad_weights(left, right, ctx.needs_input_grad[2:], weights, ctx.dispatch)
            grad_x = _back_to_tokens(grad_RF, weights, ctx.dispatch) if ctx.needs_input_grad[0] else None
        return grad_x, None, *grads


class _ScatterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RF: Tensor, gates_NK: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        rows_RF, gates_NK = rows_RF.contiguous(), gates_NK.contiguous()
        ctx.dispatch = dispatch
        ctx.save_for_backward(rows_RF, gates_NK, *weights)
        with on_device_of(rows_RF):
            return _scatter(rows_RF, weights, gates_NK, dispatch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        rows_RF, gates_NK, *weights = ctx.saved_tensors
        need_rows, need_gates, _, *needed = ctx.needs_input_grad
        grad_ND = grad_ND.contiguous()
        with on_device_of(rows_RF):
            wanted = _Wanted(rows=need_rows, gated=any(needed), gates=need_gates)
            back = _back(grad_ND, rows_RF, wanted, weights, gates_NK, ctx.dispatch)
            grads: Sequence[Tensor | None] = [None] * len(weights)
            if back.gated_RF is not None:
                left, right = _Side(back.gated_RF), _Side(grad_ND, gathered=True)
                grads = _grad_weights(left, right, needed, weights, ctx.dispatch)
        return back.rows_RF, back.gates_NK, None, *grads


class _ExpertFeedforward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, dispatch: Dispatch, num_stacks: int, *weights: Tensor
    ) -> Tensor:
        x_ND, gates_NK = x_ND.contiguous(), gates_NK.contiguous()
        up, down = weights[:num_stacks], weights[num_stacks:]
        hidden_RF = x_ND.new_empty(dispatch.order_R.numel(), up[0].shape[2])
        ctx.dispatch, ctx.num_stacks = dispatch, num_stacks
        ctx.save_for_backward(x_ND, gates_NK, hidden_RF, *weights)
        with on_device_of(x_ND):
            active_RF = _rows(_Rows(x_ND, gathered=True, activate=True, hidden=hidden_RF), up, dispatch)
            return _scatter(active_RF, down, gates_NK, dispatch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        x_ND, gates_NK, hidden_RF, *weights = ctx.saved_tensors
        up, down = weights[: ctx.num_stacks], weights[ctx.num_stacks :]
        need_x, need_gates, _, _, *needed = ctx.needs_input_grad
        need_up, need_down = needed[: len(up)], needed[len(up) :]
        grad_ND = grad_ND.contiguous()
        with on_device_of(x_ND):
            wanted = _Wanted(rows=need_x or any(need_up), gated=any(need_down), gates=need_gates, activate=True)
            back = _back(grad_ND, hidden_RF, wanted, down, gates_NK, dispatch)
            grads_up: Sequence[Tensor | None] = [None] * len(up)
            grads_down: Sequence[Tensor | None] = [None] * len(down)
            if back.gated_RF is not None:
                left, right = _Side(back.gated_RF), _Side(grad_ND, gathered=True)
                grads_down = _grad_weights(left, right, need_down, down, dispatch)
            if back.rows_RF is not None:
                left, right = _Side(x_ND, gathered=True), _Side(back.rows_RF)
                grads_up = _grad_weights(left, right, need_up, up, dispatch)
            grad_x = _back_to_tokens(back.rows_RF, up, dispatch) if need_x and back.rows_RF is not None else None
        return grad_x, back.gates_NK, None, None, *grads_up, *grads_down


@dataclass(frozen=True)
class _Rows:
    """What rows_kernel reads, and what it does on the way: gather by token, gelu, times `gates`, into token order."""

    x: Tensor
    gathered: bool = False
    activate: bool = False
    hidden: Tensor | None = None
    gates: Tensor | None = None
    in_token_order: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class _Side:
    """One factor of a weight gradient: rows in sorted order, or by token."""

    rows: Tensor
    gathered: bool = False


@dataclass(frozen=True)
class _Wanted:
    """What `_back` is asked for, and whether the rows that met the weights were still to pass a gelu."""

    rows: bool
    gated: bool
    gates: bool
    activate: bool = False


@dataclass(frozen=True)
class _Back:
    """Gradients of the rows that met the weights and of the gates, and those rows (past their gelu) times their gates.

    The last is what the weights' gradients read: a factor computed while a product runs cannot be fetched ahead.
    """

    rows_RF: Tensor | None = None
    gated_RF: Tensor | None = None
    gates_NK: Tensor | None = None


def _rows(given: _Rows, weights: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    """(R, columns): every row times its expert's matrix, stack by stack into one output."""
    depth, num_columns = _shape(weights[0], given.transposed)
    config = config_for("rows", given.x, num_columns)
    out = given.x.new_empty(dispatch.order_R.numel(), num_columns)
    for weight, tiles in _launches(weights, dispatch, config):
        num_column_tiles = triton.cdiv(num_columns, config.columns)
        rows_kernel[(tiles.shape[1] * num_column_tiles,)](
            given.x, weight, dispatch.tokens_R if given.gathered else None,
            dispatch.order_R if given.in_token_order else None, given.gates, tiles, given.hidden, out,
            given.x.stride(0), *_strides(weight, given.transposed), depth, num_columns, tiles.shape[1],
            num_column_tiles, ACTIVATE=given.activate, **_constants(config),
        )  # fmt: skip
    return out


def _scatter(rows_RF: Tensor, weights: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    given = _Rows(rows_RF, gates=gates_NK.contiguous(), in_token_order=True)
    return _sum_chosen(_rows(given, weights, dispatch), dispatch)


def _back_to_tokens(grad_RF: Tensor, weights: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    """sum_k grad[(n, k)] @ W^T."""
    return _sum_chosen(_rows(_Rows(grad_RF, in_token_order=True, transposed=True), weights, dispatch), dispatch)


def _sum_chosen(rows_RD: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows in token order -> the sum of each token's K; torch sums 16 bits in fp32 and rounds once."""
    if dispatch.num_chosen == 1:
        return rows_RD
    rows_NKD = rows_RD.view(dispatch.num_tokens, dispatch.num_chosen, rows_RD.shape[1])
    return rows_NKD[:, 0] + rows_NKD[:, 1] if dispatch.num_chosen == 2 else rows_NKD.sum(1)


def _back(
    grad_ND: Tensor, rows_RF: Tensor, wanted: _Wanted, weights: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch
) -> _Back:
    """The output's gradient through the weights, then one pass over it: a product with that in it has no room left for
    tiles as large as the product alone (its own 520 TFLOP/s on an H200 in place of 210)."""
    if not (wanted.rows or wanted.gated or wanted.gates):
        return _Back()
    through = wanted.rows or wanted.gates
    product_RF = _rows(_Rows(grad_ND, gathered=True, transposed=True), weights, dispatch) if through else None
    num_rows, num_columns = rows_RF.shape
    config = config_for("back", rows_RF, num_columns)
    back = _Back(
        product_RF if wanted.rows else None,
        torch.empty_like(rows_RF) if wanted.gated else None,
        torch.empty_like(gates_NK) if wanted.gates else None,
    )
    if num_rows:
        back_kernel[(triton.cdiv(num_rows, config.rows),)](
            product_RF, rows_RF, dispatch.order_R, gates_NK, back.gated_RF, back.gates_NK, num_rows, num_columns,
            KEEP=wanted.rows, ACTIVATE=wanted.activate, ROWS=config.rows, COLUMNS=config.columns,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return back


def _grad_weights(
    left: _Side,
    right: _Side,
    needed: Sequence[bool],
    weights: Sequence[Tensor],
    dispatch: Dispatch,
) -> list[Tensor | None]:
    """dW of every stack that needs it: the sum over an expert's rows of left^T right."""
    if list(needed) == [True] and left.rows.numel() and _library_sums(weights[0]):
        left_RX, right_RY = (
            side.rows.index_select(0, dispatch.tokens_R) if side.gathered else side.rows for side in (left, right)
        )
        return [F.grouped_mm(left_RX.t(), right_RY, offs=dispatch.bounds_E1[1:])]
    config = config_for("weights", left.rows, weights[0].shape[2])
    first = 0
    grads: list[Tensor | None] = []
    for weight, need in zip(weights, needed, strict=True):
        grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need else None
        if grad is not None and grad.numel():
            tiles = triton.cdiv(weight.shape[1], config.rows), triton.cdiv(weight.shape[2], config.columns)
            weights_kernel[(weight.shape[0] * tiles[0] * tiles[1],)](
                left.rows, right.rows, dispatch.tokens_R if left.gathered else None,
                dispatch.tokens_R if right.gathered else None,
                dispatch.bounds_E1[first:], grad, left.rows.stride(0), right.rows.stride(0), weight.shape[1],
                weight.shape[2], *tiles, **_constants(config),
            )  # fmt: skip
        grads.append(grad)
        first += weight.shape[0]
    return grads


def _library_sums(weight: Tensor) -> bool:
    """Whether torch sums weights' gradients by CUTLASS: bf16, rows in multiples of 16 bytes, on Hopper; it takes rows
    in order, of all experts, so a stack beside others has them from `weights_kernel`."""
    return (
        weight.dtype == torch.bfloat16
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
        and hasattr(F, "grouped_mm")
        and kind_of(weight.device) == "sm_90"
    )


def _launches(weights: Sequence[Tensor], dispatch: Dispatch, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Each stack, with its tiles (3, tiles): expert in the stack, first row, one past the last; no rows beyond them.

    There are as many columns as tiles at most: how many there are, the card alone knows.
    """
    first = 0
    for weight in weights:
        number, num_rows = weight.shape[0], dispatch.order_R.numel()
        most = num_rows // config.rows + min(number, num_rows)
        if number and most:
            yield weight, _tiles(dispatch, first, number, config.rows, most)
        first += number


def _tiles(dispatch: Dispatch, first: int, number: int, rows: int, most: int) -> Tensor:
    tiles: Tensor | None = dispatch.tables.get((first, number, rows))
    if tiles is None:
        tiles = torch.zeros(3, most, dtype=torch.int32, device=dispatch.bounds_E1.device)
        tiles_kernel[(number,)](
            dispatch.bounds_E1[first:], tiles, most, ROWS=rows, EXPERTS=triton.next_power_of_2(number)
        )
        dispatch.tables[first, number, rows] = tiles
    return tiles


def _shape(weight: Tensor, transposed: bool) -> tuple[int, int]:
    return (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])


def _strides(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    expert, row, column = weight.stride()
    return (expert, column, row) if transposed else (expert, row, column)


def _constants(config: Config) -> dict[str, Any]:
    return {
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "PRECISION": "ieee",
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
