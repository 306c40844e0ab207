# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Grouped linear maps on a GPU: one tiled product per stack, with gather, gelu and gate inside; no atomics.

A stack of weights is a launch of its own, so stacks are never concatenated and a frozen one launches no gradient
kernel. `tiles` lists a stack's tiles of sorted rows, none of which holds rows of two experts, from the experts' bounds
alone: nothing waits for the host to know how many rows an expert has. Programs beyond the last tile do nothing.

    tiles_kernel      the list, one program an expert
    rows_kernel       act(x[row] W_e), times its gate, written in sorted or in token order
    back_kernel       gate * active; and of P = dy[token] W_e^T, where given, the gate's gradient <active, P> and,
                      where KEEP, over P itself the rows' gradient gate * P * gelu'
    weights_kernel    sum over an expert's rows of left^T right, all of them in one program per tile of dW_e

Sums are fp32; what is written has the inputs' dtype. Rows that a token's K experts wrote lie side by side and are
summed by torch: the order of every sum is fixed.
tanh-gelu is x * sigmoid(z), z = 2 sqrt(2/pi) (x + 0.044715 x^3).
"""

from __future__ import annotations

import triton
import triton.language as tl

GELU_SCALE: tl.constexpr = tl.constexpr(0.7978845608028654)
GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def _load(start, rows, columns, row_stride, column_stride, rows_in, columns_in):
    """A tile, zeros outside."""
    at = start + (rows * row_stride)[:, None] + (columns * column_stride)[None, :]
    return tl.load(at, mask=rows_in[:, None] & columns_in[None, :], other=0.0)


@triton.jit
def _store(start, rows, columns, row_stride, rows_in, columns_in, values):
    at = start + (rows * row_stride)[:, None] + columns[None, :]
    tl.store(at, values.to(start.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])


@triton.jit
def _product(
    left, rows, left_stride, rows_in, right, columns, right_row, right_column, columns_in, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left[rows] @ right[:, columns], fp32."""
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, depth, DEPTH):
        middle = first + tl.arange(0, DEPTH)
        a = _load(left, rows, middle, left_stride, 1, rows_in, middle < depth)
        b = _load(right, middle, columns, right_row, right_column, middle < depth, columns_in)
        summed += tl.dot(a, b, input_precision=PRECISION)
    return summed


@triton.jit
def _gelu(x):
    """tanh-gelu and its derivative."""
    cubic = x * x * GELU_CUBIC
    gate = 1.0 / (1.0 + tl.exp((x + x * cubic) * -2.0 * GELU_SCALE))
    active = x * gate
    return active, gate + active * (1.0 - gate) * (1.0 + cubic * 3.0) * 2.0 * GELU_SCALE


@triton.jit
def _tile(tiles, num_tiles, num_column_tiles, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, sorted rows, which of them count, and columns: those of one tile of rows run side by side."""
    number = tl.program_id(0) // num_column_tiles
    expert = tl.load(tiles + number).to(tl.int64)
    rows = tl.load(tiles + num_tiles + number) + tl.arange(0, ROWS)
    valid = rows < tl.load(tiles + 2 * num_tiles + number)
    return expert, rows.to(tl.int64), valid, (tl.program_id(0) % num_column_tiles) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _beyond(tiles, num_tiles, num_column_tiles):
    """Whether this program's tile has no rows."""
    return tl.load(tiles + 2 * num_tiles + tl.program_id(0) // num_column_tiles) == 0


@triton.jit
def tiles_kernel(bounds, tiles, most, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Program e writes expert e's tiles after those of the experts before it."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    start = tl.load(bounds + every, mask=every < expert, other=0)
    end = tl.load(bounds + every + 1, mask=every < expert, other=0)
    tile = tl.sum((end - start + ROWS - 1) // ROWS, 0)
    last = tl.load(bounds + expert + 1)
    for first in range(tl.load(bounds + expert), last, ROWS):
        tl.store(tiles + tile, expert)
        tl.store(tiles + most + tile, first)
        tl.store(tiles + 2 * most + tile, last)
        tile += 1


@triton.jit
def rows_kernel(
    x, weight, tokens, order, gates, tiles, hidden, out, x_stride, expert_stride, depth_stride, column_stride,
    depth, num_columns, num_tiles, num_column_tiles,
    ACTIVATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if _beyond(tiles, num_tiles, num_column_tiles):
        return
    expert, rows, valid, columns = _tile(tiles, num_tiles, num_column_tiles, COLUMNS, ROWS)
    columns_in = columns < num_columns
    sources = rows
    if tokens is not None:
        sources = tl.load(tokens + rows, mask=valid, other=0)
    summed = _product(
        x, sources, x_stride, valid, weight + expert * expert_stride, columns, depth_stride, column_stride, columns_in,
        depth, ROWS, COLUMNS, DEPTH, PRECISION,
    )  # fmt: skip
    if hidden is not None:
        _store(hidden, rows, columns, num_columns, valid, columns_in, summed)
    if ACTIVATE:
        summed = _gelu(summed.to(out.dtype.element_ty).to(tl.float32))[0]  # of what backward will read
    targets = rows
    if order is not None:
        targets = tl.load(order + rows, mask=valid, other=0)
        if gates is not None:
            summed *= tl.load(gates + targets, mask=valid, other=0.0).to(tl.float32)[:, None]
    _store(out, targets, columns, num_columns, valid, columns_in, summed)


@triton.jit
def back_kernel(
    product, own_rows, order, gates, gated, grad_gates, num_rows, num_columns,
    KEEP: tl.constexpr, ACTIVATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = rows < num_rows
    choices = tl.load(order + rows, mask=valid, other=0)
    gate = tl.load(gates + choices, mask=valid, other=0.0).to(tl.float32)[:, None]
    grad_gate = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_columns, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        columns_in = columns < num_columns
        own = _load(own_rows, rows, columns, num_columns, 1, valid, columns_in).to(tl.float32)
        slope = gate
        if ACTIVATE:
            own, derivative = _gelu(own)
            slope = gate * derivative
        if gated is not None:
            _store(gated, rows, columns, num_columns, valid, columns_in, own * gate)
        if product is not None:
            summed = _load(product, rows, columns, num_columns, 1, valid, columns_in).to(tl.float32)
            if grad_gates is not None:
                grad_gate += tl.sum(own * summed, 1)
            if KEEP:
                _store(product, rows, columns, num_columns, valid, columns_in, summed * slope)
    if grad_gates is not None:
        tl.store(grad_gates + choices, grad_gate.to(grad_gates.dtype.element_ty), mask=valid)


@triton.jit
def weights_kernel(
    left, right, left_tokens, right_tokens, bounds, grad, left_stride, right_stride,
    num_rows, num_columns, num_row_tiles, num_column_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = (tl.program_id(0) // (num_column_tiles * num_row_tiles)).to(tl.int64)
    rows = (tl.program_id(0) // num_column_tiles % num_row_tiles) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % num_column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    summed = tl.zeros([ROWS, COLUMNS], tl.float32)
    last = tl.load(bounds + expert + 1)
    for first in range(tl.load(bounds + expert), last, DEPTH):
        middle = (first + tl.arange(0, DEPTH)).to(tl.int64)
        valid = middle < last
        left_at, right_at = middle, middle
        if left_tokens is not None:
            left_at = tl.load(left_tokens + middle, mask=valid, other=0)
        if right_tokens is not None:
            right_at = tl.load(right_tokens + middle, mask=valid, other=0)
        a = _load(left, left_at, rows, left_stride, 1, valid, rows < num_rows)
        b = _load(right, right_at, columns, right_stride, 1, valid, columns < num_columns)
        summed += tl.dot(tl.trans(a), b, input_precision=PRECISION)
    own_rows = expert * num_rows + rows
    _store(grad, own_rows, columns, num_columns, rows < num_rows, columns < num_columns, summed)
