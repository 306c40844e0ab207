"""Grouped linear maps, fast: in compiled code where that applies, else in torch.

In torch an op is one autograd Function around a loop of matrix products.

Every permutation is a gather, forwards and backwards: the backward of "token -> its K sorted rows"
is a gather by `inverse_R` and a sum over K, never an index_add. Gates multiply the narrow side.
Each Function asks `needs_input_grad` per stack, so a frozen stack costs neither time nor memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mfext_kernels.autograd import applied
from mfext_kernels.grouped_linear import compiled
from mfext_kernels.grouped_linear.chosen import by_token, sorted_gates, sum_chosen
from mfext_kernels.routing import Dispatch


def gather_linear(x_ND: Tensor, weights: Sequence[Tensor], dispatch: Dispatch) -> Tensor:
    """rows[r] = x[token of r] @ W[expert of r]."""
    if compiled.applies(x_ND, *weights):
        return compiled.gather_linear(x_ND, weights, dispatch)
    return applied(_GatherLinear, x_ND, dispatch, *weights)


def scatter_linear(rows_RF: Tensor, weights: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """y[n] = sum_k gate[n, k] * rows[(n, k)] @ W[expert of (n, k)]."""
    if compiled.applies(rows_RF, gates_NK, *weights):
        return compiled.scatter_linear(rows_RF, weights, gates_NK, dispatch)
    return applied(_ScatterLinear, rows_RF, gates_NK, dispatch, *weights)


def expert_feedforward(
    x_ND: Tensor, up: Sequence[Tensor], down: Sequence[Tensor], gates_NK: Tensor, dispatch: Dispatch
) -> Tensor:
    """y[n] = sum_k gate[n, k] * gelu_tanh(x[n] @ U) @ V."""
    if compiled.applies(x_ND, gates_NK, *up, *down):
        return compiled.expert_feedforward(x_ND, up, down, gates_NK, dispatch)
    if not _needs_gradient(x_ND, gates_NK, *up, *down):
        return _feed_forward((x_ND, gates_NK), up, down, dispatch, None)
    return applied(_ExpertFeedforward, x_ND, gates_NK, dispatch, len(up), *up, *down)


def order_rows(rows_RF: Tensor, dispatch: Dispatch) -> Tensor:
    """Sorted rows -> (N, K, F)."""
    if not _needs_gradient(rows_RF):
        rows = _take(rows_RF, dispatch.inverse_R)
        return rows.view(dispatch.num_tokens, dispatch.num_chosen, *rows_RF.shape[1:])
    rows = applied(_Permute, rows_RF, dispatch.inverse_R, dispatch.order_R)
    return rows.view(dispatch.num_tokens, dispatch.num_chosen, *rows_RF.shape[1:])


def sort_rows(rows_NKF: Tensor, dispatch: Dispatch) -> Tensor:
    """(N, K, F) -> sorted rows."""
    if not _needs_gradient(rows_NKF):
        return _take(rows_NKF.flatten(0, 1), dispatch.order_R)
    return applied(_Permute, rows_NKF.flatten(0, 1), dispatch.order_R, dispatch.inverse_R)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _take(rows: Tensor, index_R: Tensor) -> Tensor:
    return compiled.take_rows(rows, index_R) if compiled.applies(rows) else rows.index_select(0, index_R)


class _Permute(torch.autograd.Function):
    """rows[index]; its backward is rows[inverse index], a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _take(rows, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _take(grad, inverse), None, None


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        ctx.dispatch = dispatch
        ctx.save_for_backward(x_ND, *weights)
        rows_RF = x_ND.new_empty(dispatch.order_R.numel(), weights[0].shape[2])
        with torch.autocast(x_ND.device.type, enabled=False):
            for stack, expert, first, last in _experts(weights, dispatch.sizes):
                x = x_ND.index_select(0, dispatch.tokens_R[first:last])
                torch.mm(x, weights[stack][expert], out=rows_RF[first:last])
        return rows_RF

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        x_ND, *weights = ctx.saved_tensors
        grads = _empty_grads(weights, ctx.needs_input_grad[2:], dispatch)
        grad_x = x_ND.new_empty(grad_RF.shape[0], x_ND.shape[1]) if ctx.needs_input_grad[0] else None
        grad_RF = grad_RF.contiguous()
        with torch.autocast(x_ND.device.type, enabled=False):
            for stack, expert, first, last in _experts(weights, dispatch.sizes):
                grad_weight = grads[stack]
                if grad_weight is not None:
                    x = x_ND.index_select(0, dispatch.tokens_R[first:last])
                    torch.mm(x.t(), grad_RF[first:last], out=grad_weight[expert])
                if grad_x is not None:
                    torch.mm(grad_RF[first:last], weights[stack][expert].t(), out=grad_x[first:last])
        return sum_chosen(grad_x, None, dispatch) if grad_x is not None else None, None, *grads


class _ScatterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RF: Tensor, gates_NK: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        ctx.dispatch = dispatch
        ctx.save_for_backward(rows_RF, gates_NK, *weights)
        y_RD = rows_RF.new_empty(rows_RF.shape[0], weights[0].shape[2])
        with torch.autocast(rows_RF.device.type, enabled=False):
            for stack, expert, first, last in _experts(weights, dispatch.sizes):
                torch.mm(rows_RF[first:last], weights[stack][expert], out=y_RD[first:last])
        return sum_chosen(y_RD, gates_NK, dispatch)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        rows_RF, gates_NK, *weights = ctx.saved_tensors
        need_rows, need_gates, _, *needed = ctx.needs_input_grad
        grads = _empty_grads(weights, needed, dispatch)
        gates_R1 = sorted_gates(gates_NK, dispatch).unsqueeze(1)
        gate_grads_R = torch.empty_like(gates_R1[:, 0])
        grad_rows = torch.empty_like(rows_RF, memory_format=torch.contiguous_format)
        with torch.autocast(rows_RF.device.type, enabled=False):
            for stack, expert, first, last in _experts(weights, dispatch.sizes):
                grad, gates = grad_ND.index_select(0, dispatch.tokens_R[first:last]), gates_R1[first:last]
                rows, grad_weight = rows_RF[first:last], grads[stack]
                if need_rows or need_gates:
                    ungated = torch.mm(grad, weights[stack][expert].t(), out=grad_rows[first:last])
                    torch.linalg.vecdot(rows, ungated, out=gate_grads_R[first:last])
                    ungated.mul_(gates)
                if grad_weight is not None:
                    torch.mm((rows * gates).t(), grad, out=grad_weight[expert])
        grad_gates = by_token(gate_grads_R, dispatch) if need_gates else None
        return grad_rows if need_rows else None, grad_gates, None, *grads


class _ExpertFeedforward(torch.autograd.Function):
    """One expert at a time from gather to product, so an expert's rows stay in cache and no row of x is ever stored.

    Saves x and the hidden rows before the activation, and recomputes the activation.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, dispatch: Dispatch, num_stacks: int, *weights: Tensor
    ) -> Tensor:
        up, down = weights[:num_stacks], weights[num_stacks:]
        ctx.dispatch, ctx.num_stacks = dispatch, num_stacks
        hidden_RF = x_ND.new_empty(dispatch.num_tokens * dispatch.num_chosen, up[0].shape[2])
        ctx.save_for_backward(x_ND, gates_NK, hidden_RF, *weights)
        return _feed_forward((x_ND, gates_NK), up, down, dispatch, hidden_RF)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        x_ND, gates_NK, hidden_RF, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        up, down = weights[: ctx.num_stacks], weights[ctx.num_stacks :]
        grads_up = _empty_grads(up, needed[4 : 4 + len(up)], dispatch)
        grads_down = _empty_grads(down, needed[4 + len(up) :], dispatch)
        through = needed[0] or any(grad is not None for grad in grads_up)
        grad_x = x_ND.new_empty(hidden_RF.shape[0], x_ND.shape[1]) if needed[0] else None
        gates_R1 = sorted_gates(gates_NK, dispatch).unsqueeze(1)
        gate_grads_R = torch.empty_like(gates_R1[:, 0])
        with torch.autocast(x_ND.device.type, enabled=False):
            for stack, expert, first, last in _experts(up, dispatch.sizes):
                tokens, gates = dispatch.tokens_R[first:last], gates_R1[first:last]
                grad = grad_ND.index_select(0, tokens)
                grad_active = torch.mm(grad, down[stack][expert].t())
                active, slope = gelu_with_slope(hidden_RF[first:last], slope=through)
                torch.linalg.vecdot(active, grad_active, out=gate_grads_R[first:last])
                grad_down, grad_up = grads_down[stack], grads_up[stack]
                if grad_down is not None:
                    torch.mm(active.mul_(gates).t(), grad, out=grad_down[expert])
                if slope is None:
                    continue
                grad_hidden = grad_active.mul_(gates).mul_(slope)
                if grad_up is not None:
                    torch.mm(x_ND.index_select(0, tokens).t(), grad_hidden, out=grad_up[expert])
                if grad_x is not None:
                    torch.mm(grad_hidden, up[stack][expert].t(), out=grad_x[first:last])
        grad_gates = by_token(gate_grads_R, dispatch) if needed[1] else None
        grad_x_ND = sum_chosen(grad_x, None, dispatch) if grad_x is not None else None
        return grad_x_ND, grad_gates, None, None, *grads_up, *grads_down


def _feed_forward(
    x_gates: tuple[Tensor, Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    dispatch: Dispatch,
    hidden_RF: Tensor | None,
) -> Tensor:
    """y_ND; the hidden rows before the activation are written to `hidden_RF` where backward will want them."""
    x_ND, gates_NK = x_gates
    y_RD = x_ND.new_empty(dispatch.num_tokens * dispatch.num_chosen, down[0].shape[2])
    with torch.autocast(x_ND.device.type, enabled=False):
        for stack, expert, first, last in _experts(up, dispatch.sizes):
            x = x_ND.index_select(0, dispatch.tokens_R[first:last])
            hidden = torch.mm(x, up[stack][expert], out=None if hidden_RF is None else hidden_RF[first:last])
            torch.mm(gelu_with_slope(hidden, slope=False)[0], down[stack][expert], out=y_RD[first:last])
    return sum_chosen(y_RD, gates_NK, dispatch)


def gelu_with_slope(hidden: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """tanh-gelu x * sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3), and where asked its derivative.

    The same function as torch's tanh form; through sigmoid, which is vectorised, it costs 1.2 ns an element in place
    of 3 (and 2.2 in place of 5 with the derivative), single thread, 2026-11. bf16 is computed in fp32.
    """
    x = hidden.float() if hidden.dtype == torch.bfloat16 else hidden
    square = x * x
    z = torch.addcmul(x, square, x, value=0.044715)
    gate = z.mul_(2 * (2 / math.pi) ** 0.5).sigmoid_()
    active = x * gate
    if not slope:
        return active.to(hidden.dtype), None
    z_slope = square.mul_(6 * 0.044715 * (2 / math.pi) ** 0.5).add_(2 * (2 / math.pi) ** 0.5)
    change = z_slope.mul_(active)
    slopes = change.addcmul_(change, gate, value=-1).add_(gate)
    return active.to(hidden.dtype), slopes.to(hidden.dtype)


def _experts(weights: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(stack, expert within the stack, first row, one past the last row) of every expert that has rows."""
    first, number = 0, 0
    for stack, weight in enumerate(weights):
        for expert in range(weight.shape[0]):
            if sizes[number]:
                yield stack, expert, first, first + sizes[number]
            first += sizes[number]
            number += 1


def _empty_grads(weights: Sequence[Tensor], needed: Sequence[bool], dispatch: Dispatch) -> list[Tensor | None]:
    """Room for each needed stack's gradient: zeros where an expert has no rows, else to be written."""
    grads: list[Tensor | None] = []
    number = 0
    for weight, need in zip(weights, needed, strict=True):
        grad = torch.empty_like(weight, memory_format=torch.contiguous_format) if need else None
        for expert, size in enumerate(dispatch.sizes[number : number + weight.shape[0]]):
            if grad is not None and not size:
                grad[expert].zero_()
        grads.append(grad)
        number += weight.shape[0]
    return grads
