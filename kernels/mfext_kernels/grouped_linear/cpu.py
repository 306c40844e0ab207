"""Grouped linear maps, fast: one autograd Function per op around a loop of matrix products.

Every permutation is a gather, forwards and backwards: the backward of "token -> its K sorted rows"
is a gather by `inverse_R` and a sum over K, never an index_add. Gates multiply the narrow side.
Each Function asks `needs_input_grad` per stack, so a frozen stack costs neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfext_kernels.routing import Dispatch


def gather_linear(x_ND: Tensor, weights: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    """rows[r] = x[token of r] @ W[expert of r]."""
    rows_RF: Tensor = _GatherLinear.apply(x_ND, dispatch, *weights)  # type: ignore[no-untyped-call]
    return rows_RF


def scatter_linear(rows_RF: Tensor, weights: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """y[n] = sum_k gate[n, k] * rows[(n, k)] @ W[expert of (n, k)]."""
    y_ND: Tensor = _ScatterLinear.apply(rows_RF, gates_NK, dispatch, *weights)  # type: ignore[no-untyped-call]
    return y_ND


def expert_feedforward(
    x_ND: Tensor, up: Sequence[Tensor], down: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch
) -> Tensor:
    """y[n] = sum_k gate[n, k] * gelu_tanh(x[n] @ U) @ V."""
    y_ND: Tensor = _ExpertFeedforward.apply(x_ND, gates_NK, dispatch, len(up), *up, *down)  # type: ignore[no-untyped-call]
    return y_ND


def order_rows(rows_RF: Tensor, dispatch: Dispatch) -> Tensor:
    """Sorted rows -> (N, K, F)."""
    rows: Tensor = _Permute.apply(rows_RF, dispatch.inverse_R, dispatch.order_R)  # type: ignore[no-untyped-call]
    return rows.view(dispatch.num_tokens, dispatch.num_chosen, *rows_RF.shape[1:])


def sort_rows(rows_NKF: Tensor, dispatch: Dispatch) -> Tensor:
    """(N, K, F) -> sorted rows."""
    rows: Tensor = _Permute.apply(rows_NKF.flatten(0, 1), dispatch.order_R, dispatch.inverse_R)  # type: ignore[no-untyped-call]
    return rows


class _Permute(torch.autograd.Function):
    """rows[index]; its backward is rows[inverse index], a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        ctx.dispatch = dispatch
        ctx.save_for_backward(x_ND, *weights)
        return _multiply(x_ND.index_select(0, dispatch.tokens_R), weights, dispatch)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        x_ND, *weights = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()
        grads = _weight_grads(
            lambda: x_ND.index_select(0, dispatch.tokens_R), grad_RF, weights, ctx.needs_input_grad[2:], dispatch
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _sum_chosen(_multiply(grad_RF, weights, dispatch, transposed=True), None, dispatch)
        return grad_x, None, *grads


class _ScatterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RF: Tensor, gates_NK: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        ctx.dispatch = dispatch
        ctx.save_for_backward(rows_RF, gates_NK, *weights)
        return _sum_chosen(_multiply(rows_RF, weights, dispatch), gates_NK, dispatch)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        rows_RF, gates_NK, *weights = ctx.saved_tensors
        grad_RD = grad_ND.index_select(0, dispatch.tokens_R)
        gates_R1 = _sorted_gates(gates_NK, dispatch)
        grads = _weight_grads(lambda: rows_RF * gates_R1, grad_RD, weights, ctx.needs_input_grad[3:], dispatch)
        grad_rows = grad_gates = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_rows = _multiply(grad_RD, weights, dispatch, transposed=True)
            if ctx.needs_input_grad[1]:
                grad_gates = _gate_grads(rows_RF, grad_rows, gates_NK, dispatch)
            grad_rows = grad_rows.mul_(gates_R1) if ctx.needs_input_grad[0] else None
        return grad_rows, grad_gates, None, *grads


class _ExpertFeedforward(torch.autograd.Function):
    """Saves x and the hidden rows before the activation; recomputes the activation, never stores y per row."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, dispatch: Dispatch, num_stacks: int, *weights: Tensor
    ) -> Tensor:
        ctx.dispatch, ctx.num_stacks = dispatch, num_stacks
        hidden_RF = _multiply(x_ND.index_select(0, dispatch.tokens_R), weights[:num_stacks], dispatch)
        ctx.save_for_backward(x_ND, gates_NK, hidden_RF, *weights)
        active_RF = F.gelu(hidden_RF, approximate="tanh")
        return _sum_chosen(_multiply(active_RF, weights[num_stacks:], dispatch), gates_NK, dispatch)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        x_ND, gates_NK, hidden_RF, *weights = ctx.saved_tensors
        up, down = weights[: ctx.num_stacks], weights[ctx.num_stacks :]
        need_x, need_gates, _, _, *need_weights = ctx.needs_input_grad
        need_up, need_down = need_weights[: ctx.num_stacks], need_weights[ctx.num_stacks :]
        grad_RD = grad_ND.index_select(0, dispatch.tokens_R)
        gates_R1 = _sorted_gates(gates_NK, dispatch)
        active_RF = F.gelu(hidden_RF, approximate="tanh")
        grad_active = _multiply(grad_RD, down, dispatch, transposed=True)
        grad_gates = _gate_grads(active_RF, grad_active, gates_NK, dispatch) if need_gates else None
        grads_down = _weight_grads(lambda: active_RF.mul_(gates_R1), grad_RD, down, need_down, dispatch)
        if not (need_x or any(need_up)):
            return None, grad_gates, None, None, *[None] * len(up), *grads_down
        grad_hidden = torch.ops.aten.gelu_backward(grad_active.mul_(gates_R1), hidden_RF, approximate="tanh")
        grads_up = _weight_grads(lambda: x_ND.index_select(0, dispatch.tokens_R), grad_hidden, up, need_up, dispatch)
        grad_x = _sum_chosen(_multiply(grad_hidden, up, dispatch, transposed=True), None, dispatch) if need_x else None
        return grad_x, grad_gates, None, None, *grads_up, *grads_down


def _experts(weights: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(stack, expert within the stack, first row, one past the last row) of every expert that has rows."""
    first, number = 0, 0
    for stack, weight in enumerate(weights):
        for expert in range(weight.shape[0]):
            if sizes[number]:
                yield stack, expert, first, first + sizes[number]
            first += sizes[number]
            number += 1


def _multiply(rows: Tensor, weights: Sequence[Tensor], dispatch: Dispatch, transposed: bool = False) -> Tensor:
    out = rows.new_empty(rows.shape[0], weights[0].shape[1 if transposed else 2])
    with torch.autocast(rows.device.type, enabled=False):
        for stack, expert, first, last in _experts(weights, dispatch.sizes):
            matrix = weights[stack][expert]
            torch.mm(rows[first:last], matrix.t() if transposed else matrix, out=out[first:last])
    return out


def _weight_grads(
    make_rows: Any, grad_rows: Tensor, weights: Sequence[Tensor], needed: Sequence[bool], dispatch: Dispatch
) -> list[Tensor | None]:
    """Per stack, rows^T @ grad_rows of each expert; None for a stack that needs none (and no work if none does)."""
    if not any(needed):
        return [None] * len(weights)
    rows = make_rows()
    grads = [
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need else None
        for weight, need in zip(weights, needed, strict=True)
    ]
    number = first = 0
    with torch.autocast(rows.device.type, enabled=False):
        for weight, grad in zip(weights, grads, strict=True):
            for expert in range(weight.shape[0]):
                last = first + dispatch.sizes[number]
                if grad is not None and last > first:
                    torch.mm(rows[first:last].t(), grad_rows[first:last], out=grad[expert])
                elif grad is not None:
                    grad[expert].zero_()
                first, number = last, number + 1
    return grads


def _sorted_gates(gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    return gates_NK.reshape(-1).index_select(0, dispatch.order_R).unsqueeze(1)


def _gate_grads(rows_RF: Tensor, grad_rows: Tensor, gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """d gate = <row, gradient of the ungated row>, per (n, k)."""
    products_R: Tensor = torch.linalg.vecdot(rows_RF, grad_rows)
    return products_R.index_select(0, dispatch.inverse_R).view_as(gates_NK)


def _sum_chosen(rows: Tensor, gates_NK: Tensor | None, dispatch: Dispatch) -> Tensor:
    """Sorted rows -> per token the sum over its K rows, times gates where given. bf16 sums in fp32."""
    index_NK = dispatch.inverse_R.view(dispatch.num_tokens, dispatch.num_chosen)
    if rows.dtype in (torch.float32, torch.float64) and rows.device.type == "cpu" and rows.shape[0]:
        summed: Tensor = F.embedding_bag(index_NK, rows, per_sample_weights=gates_NK, mode="sum")
        return summed
    picked = rows.index_select(0, dispatch.inverse_R).view(*index_NK.shape, rows.shape[1])
    if gates_NK is not None:
        picked = picked.float() * gates_NK.float().unsqueeze(-1)
    return picked.sum(1, dtype=torch.float32 if rows.dtype == torch.bfloat16 else None).to(rows.dtype)
