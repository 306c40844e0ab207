# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Stick-breaking attention of wide heads on a GPU: what is between the products, on a stripe of rows' scores.

A program walks the keys of a few rows in tiles, with the maths of triton_kernels.py: forward from the newest key on,
backward then back again from the oldest. Scores, dA and weights are buffers (pairs, rows, keys) of one stripe, whose
last key is the newest that its last query sees. Every weight is written: 0 where a key is not visible, or where no
stick of the program's rows reaches. Backward writes g = dA a over dA, and reads it again after a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mfext_kernels.stickbreaking.triton_kernels import LEAST_STICK, MOST_LOG2, break_stick, load_starts


@triton.jit
def _rows_of_stripe(
    starts, ends, first_pair, heads, length, num_keys, first_row, num_rows, CHOSEN: tl.constexpr, ROWS: tl.constexpr
):
    """A program's rows (the longest first): their places in the buffers, and what each sees."""
    num_blocks = tl.cdiv(num_rows, ROWS)
    pair = tl.program_id(0) // num_blocks
    own = (num_blocks - 1 - tl.program_id(0) % num_blocks) * ROWS + tl.arange(0, ROWS)
    valid = own < num_rows
    rows = first_row + own
    batch = ((first_pair + pair) // heads).to(tl.int64)
    first_keys = load_starts(starts, batch, rows, valid, length, CHOSEN)
    places = pair.to(tl.int64) * num_rows + own
    end = num_keys
    if ends is not None:
        end = tl.load(ends + batch).to(tl.int32)
    return places, valid, end - length + rows // CHOSEN, first_keys


@triton.jit
def _newest_and_oldest(positions, first_keys, valid, num_keys, KEYS: tl.constexpr):
    """The tiles of the newest key any of the rows sees, and of the oldest."""
    newest = tl.max(tl.where(valid, positions, 0))
    oldest = tl.maximum(tl.min(tl.where(valid, first_keys, num_keys)), 0)
    return newest // KEYS, oldest // KEYS


@triton.jit
def _tile(tile, places, stride, positions, first_keys, valid, KEYS: tl.constexpr):
    """Where a tile lies in a buffer, and which of it is visible."""
    keys = tile * KEYS + tl.arange(0, KEYS)
    visible = (keys[None, :] <= positions[:, None]) & (keys[None, :] >= first_keys[:, None]) & valid[:, None]
    return (places * stride)[:, None] + keys[None, :], visible


@triton.jit
def _odds_and_left(scores, at, visible, scale_log2):
    """exp(l) and sigmoid(-l); 0 and 1 where a key is not visible. A NaN stays one."""
    exponent = tl.load(scores + at, mask=visible, other=0.0) * scale_log2
    exponent = tl.where(exponent > MOST_LOG2, MOST_LOG2, exponent)
    odds = tl.where(visible, tl.exp2(exponent), 0.0)
    return odds, 1.0 / (1.0 + odds)


@triton.jit
def _store(buffer, tile, places, stride, valid, values, num_columns, KEYS: tl.constexpr):
    keys = tile * KEYS + tl.arange(0, KEYS)
    at = buffer + (places * stride)[:, None] + keys[None, :]
    tl.store(at, values.to(buffer.dtype.element_ty), mask=valid[:, None] & (keys < num_columns)[None, :])


@triton.jit
def _clear(buffer, first, last, places, stride, valid, num_columns, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Zeros in the tiles [first, last)."""
    zeros = tl.zeros([ROWS, KEYS], tl.float32)
    for tile in range(first, last):
        _store(buffer, tile, places, stride, valid, zeros, num_columns, KEYS)


@triton.jit
def wide_forward_kernel(
    scores, starts, ends, weights, weights_stride,
    first_pair, heads, length, num_keys, first_row, num_rows, num_columns, scale_log2,
    CHOSEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    places, valid, positions, first_keys = _rows_of_stripe(
        starts, ends, first_pair, heads, length, num_keys, first_row, num_rows, CHOSEN, ROWS
    )
    newest, oldest = _newest_and_oldest(positions, first_keys, valid, num_keys, KEYS)
    stick = tl.where(valid, 1.0, 0.0)
    most_left = 1.0
    tile = newest
    while (tile >= oldest) & (most_left > LEAST_STICK):
        at, visible = _tile(tile, places, num_columns, positions, first_keys, valid, KEYS)
        odds, left = _odds_and_left(scores, at, visible, scale_log2)
        after, stick = break_stick(left, stick, KEYS)
        _store(weights, tile, places, weights_stride, valid, after * odds, num_columns, KEYS)
        most_left = tl.max(tl.where(first_keys < tile * KEYS, stick, 0.0))
        tile -= 1
    _clear(weights, 0, tile + 1, places, weights_stride, valid, num_columns, ROWS, KEYS)
    _clear(weights, newest + 1, tl.cdiv(num_columns, KEYS), places, weights_stride, valid, num_columns, ROWS, KEYS)


@triton.jit
def wide_backward_kernel(
    scores, grads, starts, weights, grad_logits, weights_stride,
    first_pair, heads, length, num_keys, first_row, num_rows, num_columns, scale_log2,
    CHOSEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`grads` holds dA; g is kept there. The logits' gradients lie as the weights do."""
    places, valid, positions, first_keys = _rows_of_stripe(
        starts, None, first_pair, heads, length, num_keys, first_row, num_rows, CHOSEN, ROWS
    )
    newest, oldest = _newest_and_oldest(positions, first_keys, valid, num_keys, KEYS)
    stick = tl.where(valid, 1.0, 0.0)
    most_left = 1.0
    tile = newest
    while (tile >= oldest) & (most_left > LEAST_STICK):
        at, visible = _tile(tile, places, num_columns, positions, first_keys, valid, KEYS)
        odds, left = _odds_and_left(scores, at, visible, scale_log2)
        after, stick = break_stick(left, stick, KEYS)
        _store(weights, tile, places, weights_stride, valid, after * odds, num_columns, KEYS)
        g = after * odds * tl.load(grads + at, mask=visible, other=0.0)
        tl.store(grads + at, g, mask=visible)
        most_left = tl.max(tl.where(first_keys < tile * KEYS, stick, 0.0))
        tile -= 1
    tl.debug_barrier()  # g may be read by another thread than wrote it
    older = tl.zeros([ROWS], tl.float32)
    for again in range(tile + 1, newest + 1):
        at, visible = _tile(again, places, num_columns, positions, first_keys, valid, KEYS)
        odds, left = _odds_and_left(scores, at, visible, scale_log2)
        g = tl.load(grads + at, mask=visible, other=0.0)
        summed = older[:, None] + tl.cumsum(g, 1)
        values = g - odds * left * summed
        _store(grad_logits, again, places, weights_stride, valid, values, num_columns, KEYS)
        # Not older += sum(g): a sum that nothing reads after the loop breaks Triton 3.7's compiler.
        older = tl.sum(tl.where(tl.arange(0, KEYS)[None, :] == KEYS - 1, summed, 0.0), 1)
    num_tiles = tl.cdiv(num_columns, KEYS)
    _clear(weights, 0, tile + 1, places, weights_stride, valid, num_columns, ROWS, KEYS)
    _clear(weights, newest + 1, num_tiles, places, weights_stride, valid, num_columns, ROWS, KEYS)
    _clear(grad_logits, 0, tile + 1, places, weights_stride, valid, num_columns, ROWS, KEYS)
    _clear(grad_logits, newest + 1, num_tiles, places, weights_stride, valid, num_columns, ROWS, KEYS)
