"""Expert maps in compiled code, products included: experts.c, float32 on the CPU.

The maps of cpu.py, each in one call for all experts. Rows are shared out among torch's threads; of matrices' gradients,
which sum over rows, the gradients' own rows are: no number's bits depend on how many threads there are. Not used where
there is no compiler (native.py), in other precisions or under autocast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.autograd import applied
from mfext_kernels.grouped_linear.chosen import by_token, sorted_gates
from mfext_kernels.native import CONTRACTED, Source, in_parts
from mfext_kernels.routing import Dispatch

SOURCE = Source(Path(__file__).with_name("experts.c"), (CONTRACTED,))
available, explain = SOURCE.available, SOURCE.explain
ARGUMENTS = {  # pointers, numbers
    "mfext_rows_by_matrices": (6, 5),
    "mfext_matrices_of_rows": (8, 5),
    "mfext_feed_forward": (8, 5),
    "mfext_feed_forward_backward": (12, 5),
}
AT_ONCE, WIDEST_STRIP, MOST_ROWS = 512, 32, 8  # as in experts.c and small_products.h
WORTH_A_THREAD = 1 << 21  # multiplications
COPIED_BY_A_THREAD = 1 << 18  # numbers


def applies(rows: Tensor, *weights: Tensor) -> bool:
    """Whether such rows and matrices go this way."""
    plain = all(each.dtype == torch.float32 and each.device.type == "cpu" for each in (rows, *weights))
    return plain and not torch.is_autocast_enabled("cpu") and available()


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
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x_ND, gates_NK, *up, *down)):
        return applied(_ExpertFeedforward, x_ND, gates_NK, dispatch, len(up), *up, *down)
    return _feed_forward((x_ND.contiguous(), gates_NK), _contiguous(up), _contiguous(down), dispatch, None)


def take_rows(rows: Tensor, index_R: Tensor) -> Tensor:
    """rows[index], of rows of any shape; not differentiated."""
    rows = rows.contiguous()
    out = rows.new_empty(len(index_R), *rows.shape[1:])
    width = out[0].numel() if len(out) else 0
    call = SOURCE.function("mfext_take_rows", (ctypes.c_void_p,) * 3 + (ctypes.c_int64,) * 3)
    pointers = [each.data_ptr() for each in (out, rows, index_R)]
    in_parts(len(out), lambda first, last: call(*pointers, width, first, last), out.numel() // COPIED_BY_A_THREAD)
    return out


def sum_chosen(rows_RD: Tensor, gates_NK: Tensor | None, dispatch: Dispatch) -> Tensor:
    """Sorted rows -> per token the sum over its K rows, times gates where given; not differentiated."""
    out = rows_RD.new_empty(dispatch.num_tokens, rows_RD.shape[1])
    call = SOURCE.function("mfext_sum_chosen", (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 4)
    gates_NK = None if gates_NK is None else gates_NK.contiguous()
    pointers = [_pointer(each) for each in (out, rows_RD, dispatch.inverse_R, gates_NK)]
    sizes = dispatch.num_chosen, rows_RD.shape[1]
    in_parts(len(out), lambda first, last: call(*pointers, *sizes, first, last), rows_RD.numel() // COPIED_BY_A_THREAD)
    return out


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        x_ND, matrices = x_ND.contiguous(), _contiguous(weights)
        ctx.dispatch = dispatch
        ctx.save_for_backward(x_ND, *matrices)
        return _rows_by_matrices(x_ND, dispatch.tokens_R, matrices, dispatch, turned=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        x_ND, *weights = ctx.saved_tensors
        grad_RF, grad_x = grad_RF.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_x = sum_chosen(_rows_by_matrices(grad_RF, None, weights, dispatch, turned=True), None, dispatch)
        left, right = _Rows(x_ND, dispatch.tokens_R), _Rows(grad_RF, None)
        return grad_x, None, *_matrices_of_rows(left, right, None, weights, ctx.needs_input_grad[2:], dispatch)


class _ScatterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RF: Tensor, gates_NK: Tensor, dispatch: Dispatch, *weights: Tensor) -> Tensor:
        rows_RF, matrices = rows_RF.contiguous(), _contiguous(weights)
        ctx.dispatch = dispatch
        ctx.save_for_backward(rows_RF, gates_NK, *matrices)
        return sum_chosen(_rows_by_matrices(rows_RF, None, matrices, dispatch, turned=False), gates_NK, dispatch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        rows_RF, gates_NK, *weights = ctx.saved_tensors
        need_rows, need_gates, _, *needed = ctx.needs_input_grad
        grad_ND, gates_R = grad_ND.contiguous(), sorted_gates(gates_NK, dispatch)
        grad_rows, grad_gates = None, None
        if need_rows or need_gates:
            grad_rows = _rows_by_matrices(grad_ND, dispatch.tokens_R, weights, dispatch, turned=True)
            grad_gates = by_token(torch.linalg.vecdot(rows_RF, grad_rows), dispatch) if need_gates else None
            grad_rows.mul_(gates_R.unsqueeze(1))
        left, right = _Rows(rows_RF, None), _Rows(grad_ND, dispatch.tokens_R)
        grads = _matrices_of_rows(left, right, gates_R, weights, needed, dispatch)
        return grad_rows if need_rows else None, grad_gates, None, *grads


class _ExpertFeedforward(torch.autograd.Function):
    """Saves x and the hidden rows before the activation, and recomputes the activation."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, dispatch: Dispatch, num_stacks: int, *weights: Tensor
    ) -> Tensor:
        x_ND, matrices = x_ND.contiguous(), _contiguous(weights)
        up, down = matrices[:num_stacks], matrices[num_stacks:]
        ctx.dispatch, ctx.num_stacks = dispatch, num_stacks
        hidden_RF = x_ND.new_empty(dispatch.order_R.numel(), up[0].shape[2])
        ctx.save_for_backward(x_ND, gates_NK, hidden_RF, *matrices)
        return _feed_forward((x_ND, gates_NK), up, down, dispatch, hidden_RF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        dispatch: Dispatch = ctx.dispatch
        x_ND, gates_NK, hidden_RF, *weights = ctx.saved_tensors
        up, down = weights[: ctx.num_stacks], weights[ctx.num_stacks :]
        need_x, need_gates, _, _, *needed = ctx.needs_input_grad
        need_up, need_down = needed[: len(up)], needed[len(up) :]
        grad_ND, gates_R = grad_ND.contiguous(), sorted_gates(gates_NK, dispatch)
        gate_grads_R, hidden_grads = torch.empty_like(gates_R), torch.empty_like(hidden_RF)
        gated = torch.empty_like(hidden_RF) if any(need_down) else None
        grad_x = x_ND.new_empty(len(hidden_RF), x_ND.shape[1]) if need_x else None
        made = (gate_grads_R, hidden_grads, gated, grad_x)
        given = (grad_ND, hidden_RF, gates_R, dispatch.tokens_R, _pointers(up), _pointers(down), dispatch.bounds_E1)
        sizes = (x_ND.shape[1], hidden_RF.shape[1], grad_ND.shape[1])
        _over_rows("mfext_feed_forward_backward", (*made, *given), max(sizes) * WIDEST_STRIP, sizes, dispatch)
        of_x, of_y = _Rows(x_ND, dispatch.tokens_R), _Rows(grad_ND, dispatch.tokens_R)
        grads_up = _matrices_of_rows(of_x, _Rows(hidden_grads, None), None, up, need_up, dispatch)
        of_hidden = _Rows(hidden_RF if gated is None else gated, None)
        grads_down = _matrices_of_rows(of_hidden, of_y, None, down, need_down, dispatch)
        return (
            None if grad_x is None else sum_chosen(grad_x, None, dispatch),
            by_token(gate_grads_R, dispatch) if need_gates else None,
            None,
            None,
            *grads_up,
            *grads_down,
        )


@dataclass(frozen=True)
class _Rows:
    """Sorted row r lies in `rows` at index[r], or in order."""

    rows: Tensor
    index: Tensor | None


def _feed_forward(
    x_gates: tuple[Tensor, Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    dispatch: Dispatch,
    hidden_RF: Tensor | None,
) -> Tensor:
    """y_ND; the hidden rows before the activation are written to `hidden_RF` where backward will want them."""
    x_ND, gates_NK = x_gates
    sizes = (x_ND.shape[1], up[0].shape[2], down[0].shape[2])
    y_RD = x_ND.new_empty(dispatch.order_R.numel(), sizes[2])
    given = (y_RD, hidden_RF, x_ND, dispatch.tokens_R, _pointers(up), _pointers(down), dispatch.bounds_E1)
    room = 2 * min(AT_ONCE, len(y_RD)) * sizes[1] + max(sizes) * WIDEST_STRIP
    _over_rows("mfext_feed_forward", given, room, sizes, dispatch)
    return sum_chosen(y_RD, gates_NK, dispatch)


def _rows_by_matrices(
    rows: Tensor, index_R: Tensor | None, weights: Sequence[Tensor], dispatch: Dispatch, turned: bool
) -> Tensor:
    """Each sorted row times its expert's matrix, or its transpose."""
    inner, wide = weights[0].shape[2 if turned else 1], weights[0].shape[1 if turned else 2]
    out = rows.new_empty(dispatch.order_R.numel(), wide)
    given = (out, rows, index_R, _pointers(weights), dispatch.bounds_E1)
    _over_rows("mfext_rows_by_matrices", given, inner * WIDEST_STRIP, (inner, wide, int(turned)), dispatch)
    return out


def _matrices_of_rows(
    left: _Rows,
    right: _Rows,
    scales_R: Tensor | None,
    weights: Sequence[Tensor],
    needed: Sequence[bool],
    dispatch: Dispatch,
) -> list[Tensor | None]:
    """The needed gradients of stacks, from all rows: the sum of left[r]^T right[r], times scales[r] where given."""
    pairs = zip(weights, needed, strict=True)
    grads = [torch.empty_like(each, memory_format=torch.contiguous_format) if need else None for each, need in pairs]
    if not any(needed):
        return grads
    counts = [weight.shape[0] for weight in weights]
    sums = _array([address for grad, count in zip(grads, counts, strict=True) for address in _addresses(grad, count)])
    given = (sums, left.rows, left.index, right.rows, right.index, scales_R, dispatch.bounds_E1)
    _, tall, wide = weights[0].shape
    call, rows = _function("mfext_matrices_of_rows"), dispatch.order_R.numel()
    pointers = [_pointer(each) for each in given]

    def run(first: int, last: int) -> None:
        room = _room(min(AT_ONCE, rows) * (WIDEST_STRIP + last - first + MOST_ROWS))
        call(*pointers, room.data_ptr(), dispatch.num_experts, tall, wide, first, last)

    in_parts(tall, run, rows * tall * wide // WORTH_A_THREAD)
    return grads


def _over_rows(
    name: str,
    given: tuple[Tensor | ctypes.Array[ctypes.c_void_p] | None, ...],
    room: int,
    sizes: tuple[int, int, int],
    dispatch: Dispatch,
) -> None:
    """Call a function of experts.c over all sorted rows, each thread with a room of so many numbers."""
    call, pointers, rows = _function(name), [_pointer(each) for each in given], dispatch.order_R.numel()

    def run(first: int, last: int) -> None:
        own = _room(room)
        call(*pointers, own.data_ptr(), *sizes, first, last)

    in_parts(rows, run, rows * sizes[0] * sizes[1] // WORTH_A_THREAD)


def _function(name: str) -> Callable[..., int]:
    pointers, numbers = ARGUMENTS[name]
    return SOURCE.operations(name, (ctypes.c_void_p,) * pointers + (ctypes.c_int64,) * numbers)


def _room(numbers: int) -> Tensor:
    return torch.empty(numbers, dtype=torch.float32)


def _contiguous(stacks: Sequence[Tensor]) -> list[Tensor]:
    return [each.contiguous() for each in stacks]


def _pointers(stacks: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Where each expert's matrix lies, over all stacks."""
    return _array([address for each in stacks for address in _addresses(each, each.shape[0])])


def _addresses(stack_EMN: Tensor | None, count: int) -> list[int]:
    if stack_EMN is None:
        return [0] * count
    start, step = stack_EMN.data_ptr(), stack_EMN.shape[1] * stack_EMN.shape[2] * stack_EMN.element_size()
    return [start + expert * step for expert in range(count)]


def _array(addresses: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _pointer(given: Tensor | ctypes.Array[ctypes.c_void_p] | None) -> int:
    if given is None:
        return 0
    return given.data_ptr() if isinstance(given, Tensor) else ctypes.addressof(given)
