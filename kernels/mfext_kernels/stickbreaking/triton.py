# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Stick-breaking attention on a GPU: tiles of rows by keys, recomputed in backward, sums in fp32, no atomics.

A row is a (query, chosen expert) pair of one (batch, head) pair: row m is query m // K, so all K experts' queries meet
a key tile while it is at hand. Tiles are walked from the newest key to the oldest, in linear space. With odds
e = exp(l), p = 1 / (1 + e) and c the running product of p from the newest key to this one included,

    a = sigmoid(l) c_before = c e

so a tile costs one exponential, one reciprocal and one scan, and no logarithm. e is capped at 2^60: a stick then keeps
at most 2^-60 of what it had, and nothing overflows. A block of rows stops once no row has more than 2^-60 left.

Backward of g = dA a: dl_m = g_m - sigmoid(l_m) sum over j <= m of g_j. Three kernels a stripe of rows: `sticks_kernel`
walks to older keys and keeps c before every tile; `grad_queries_kernel` walks back to newer keys, adds up g from the
oldest key on (a difference from the total would cancel) and keeps the sum before every tile; `grad_keys_kernel` goes,
for one key tile, over the rows that met it. What is kept is two numbers per row and key tile; a stripe is as many rows
as fit CARRIED_BYTES, so memory stays linear in T, and the stripes add to dK and dV in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.backends import on_device_of
from mfext_kernels.tuning import Config, config_for

LOG2_E = 1.4426950408889634
MOST_LOG2: tl.constexpr = tl.constexpr(60.0)
LEAST_STICK: tl.constexpr = tl.constexpr(2.0**-60)
TILES_BETWEEN_LOOKS: tl.constexpr = tl.constexpr(
    4
)  # at what is left of the sticks: a loop of known length is pipelined
TILES_PER_SPLIT = 4
CARRIED_BYTES = 1 << 26


@triton.jit
def _load(rows_at, rows, row_stride, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of WIDTH numbers, zeros beside them and where not valid -> (rows, PADDED)."""
    channels = tl.arange(0, PADDED)
    at = rows_at + (rows.to(tl.int64) * row_stride)[:, None] + channels[None, :]
    return tl.load(at, mask=valid[:, None] & (channels < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(rows_at, rows, row_stride, valid, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    channels = tl.arange(0, PADDED)
    at = rows_at + (rows.to(tl.int64) * row_stride)[:, None] + channels[None, :]
    tl.store(at, values.to(rows_at.dtype.element_ty), mask=valid[:, None] & (channels < WIDTH)[None, :])


@triton.jit
def _load_starts(starts, batch, rows, valid, length, CHOSEN: tl.constexpr):
    """The first visible key of every row."""
    first_keys = tl.zeros_like(rows)
    if starts is not None:
        first_keys = tl.load(starts + batch * length + rows // CHOSEN, mask=valid, other=0).to(tl.int32)
    return first_keys


@triton.jit
def _odds_and_left(q, k, keys, positions, first_keys, valid, scale_log2, PRECISION: tl.constexpr):
    """exp(l) and sigmoid(-l); 0 and 1 where a key is not visible. A NaN stays one."""
    exponent = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    exponent = tl.where(exponent > MOST_LOG2, MOST_LOG2, exponent)
    visible = (keys[None, :] <= positions[:, None]) & (keys[None, :] >= first_keys[:, None]) & valid[:, None]
    odds = tl.where(visible, tl.exp2(exponent), 0.0)
    return odds, 1.0 / (1.0 + odds)


@triton.jit
def _break_stick(left, stick, KEYS: tl.constexpr):
    """The stick left after each key of the tile, the newest the last column; and after the whole tile."""
    after = tl.cumprod(left, 1, reverse=True) * stick[:, None]
    whole = tl.sum(tl.where(tl.arange(0, KEYS)[None, :] == 0, after, 0.0), 1)
    return after, whole


@triton.jit
def _newest_and_oldest(
    block, rows, first_keys, valid, length, num_keys, ROWS: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr
):
    """The tiles of the newest key any row of the block sees, and of the oldest."""
    last_row = tl.minimum((block + 1) * ROWS, length * CHOSEN) - 1
    oldest = tl.maximum(tl.min(tl.where(valid, first_keys, num_keys)), 0)
    return (num_keys - length + last_row // CHOSEN) // KEYS, oldest // KEYS


@triton.jit
def forward_kernel(
    q, k, v, starts, out, k_batch, k_key, k_head, v_batch, v_key, v_head,
    length, num_keys, heads, num_blocks, scale_log2,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // num_blocks
    block = num_blocks - 1 - tl.program_id(0) % num_blocks  # the longest first
    batch, head = (pair // heads).to(tl.int64), pair % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < length * CHOSEN
    positions = num_keys - length + rows // CHOSEN
    first_keys = _load_starts(starts, batch, rows, valid, length, CHOSEN)
    tile, oldest = _newest_and_oldest(block, rows, first_keys, valid, length, num_keys, ROWS, KEYS, CHOSEN)
    at = (batch * length * CHOSEN * heads + head) * WIDTH
    queries = _load(q + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
    k_at, v_at = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    stick = tl.where(valid, 1.0, 0.0)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    most_left = 1.0
    while (tile >= oldest) & (most_left > LEAST_STICK):
        count = tl.minimum(TILES_BETWEEN_LOOKS, tile - oldest + 1)
        for step in range(count):
            keys = (tile - step) * KEYS + tl.arange(0, KEYS)
            key_rows = _load(k_at, keys, k_key, keys < num_keys, WIDTH, PADDED)
            odds, left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)
            after, stick = _break_stick(left, stick, KEYS)
            values = _load(v_at, keys, v_key, keys < num_keys, WIDTH, PADDED)
            summed += tl.dot((after * odds).to(values.dtype), values, input_precision=PRECISION)
        tile -= count
        most_left = tl.max(tl.where(first_keys < (tile + 1) * KEYS, stick, 0.0))
    _store(out + at, rows, heads * WIDTH, valid, summed, WIDTH, PADDED)


@triton.jit
def sticks_kernel(
    q, k, starts, sticks, first_tiles, k_batch, k_key, k_head,
    length, num_keys, heads, num_blocks, first_block, num_tiles, scale_log2,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // num_blocks
    own = num_blocks - 1 - tl.program_id(0) % num_blocks
    block = first_block + own
    batch, head = (pair // heads).to(tl.int64), pair % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < length * CHOSEN
    positions = num_keys - length + rows // CHOSEN
    first_keys = _load_starts(starts, batch, rows, valid, length, CHOSEN)
    tile, oldest = _newest_and_oldest(block, rows, first_keys, valid, length, num_keys, ROWS, KEYS, CHOSEN)
    at = (batch * length * CHOSEN * heads + head) * WIDTH
    queries = _load(q + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
    k_at = k + batch * k_batch + head * k_head
    stick = tl.where(valid, 1.0, 0.0)
    most_left = 1.0
    while (tile >= oldest) & (most_left > LEAST_STICK):
        count = tl.minimum(TILES_BETWEEN_LOOKS, tile - oldest + 1)
        for step in range(count):
            carried = ((pair.to(tl.int64) * num_tiles + tile - step) * num_blocks + own) * ROWS
            tl.store(sticks + carried + tl.arange(0, ROWS), stick)
            keys = (tile - step) * KEYS + tl.arange(0, KEYS)
            key_rows = _load(k_at, keys, k_key, keys < num_keys, WIDTH, PADDED)
            left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)[1]
            stick = _break_stick(left, stick, KEYS)[1]
        tile -= count
        most_left = tl.max(tl.where(first_keys < (tile + 1) * KEYS, stick, 0.0))
    tl.store(first_tiles + pair * num_blocks + own, tile + 1)


@triton.jit
def grad_queries_kernel(
    q, k, v, starts, grad_out, sticks, sums, first_tiles, grad_q,
    k_batch, k_key, k_head, v_batch, v_key, v_head,
    length, num_keys, heads, num_blocks, first_block, num_tiles, scale_log2, scale,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) // num_blocks
    own = num_blocks - 1 - tl.program_id(0) % num_blocks
    block = first_block + own
    batch, head = (pair // heads).to(tl.int64), pair % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < length * CHOSEN
    positions = num_keys - length + rows // CHOSEN
    first_keys = _load_starts(starts, batch, rows, valid, length, CHOSEN)
    newest = _newest_and_oldest(block, rows, first_keys, valid, length, num_keys, ROWS, KEYS, CHOSEN)[0]
    at = (batch * length * CHOSEN * heads + head) * WIDTH
    queries = _load(q + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
    grads = _load(grad_out + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
    k_at, v_at = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    older = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    for tile in range(tl.load(first_tiles + pair * num_blocks + own), newest + 1):
        carried = ((pair.to(tl.int64) * num_tiles + tile) * num_blocks + own) * ROWS + tl.arange(0, ROWS)
        tl.store(sums + carried, older)
        keys = tile * KEYS + tl.arange(0, KEYS)
        key_rows = _load(k_at, keys, k_key, keys < num_keys, WIDTH, PADDED)
        odds, left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)
        after = _break_stick(left, tl.load(sticks + carried), KEYS)[0]
        values = _load(v_at, keys, v_key, keys < num_keys, WIDTH, PADDED)
        g = after * odds * tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        grad_logits = g - odds * left * (older[:, None] + tl.cumsum(g, 1))
        summed += tl.dot(grad_logits.to(key_rows.dtype), key_rows, input_precision=PRECISION)
        older += tl.sum(g, 1)
    _store(grad_q + at, rows, heads * WIDTH, valid, summed * scale, WIDTH, PADDED)


@triton.jit
def grad_keys_kernel(
    q, k, v, starts, grad_out, sticks, sums, first_tiles, grad_k, grad_v,
    k_batch, k_key, k_head, v_batch, v_key, v_head,
    length, num_keys, heads, num_blocks, first_block, num_tiles, scale_log2, scale,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    pair, tile = (
        tl.program_id(0) // num_tiles,
        tl.program_id(0) % num_tiles,
    )  # the oldest keys first: most rows see them
    batch, head = (pair // heads).to(tl.int64), pair % heads
    keys = tile * KEYS + tl.arange(0, KEYS)
    key_rows = _load(k + batch * k_batch + head * k_head, keys, k_key, keys < num_keys, WIDTH, PADDED)
    values = _load(v + batch * v_batch + head * v_head, keys, v_key, keys < num_keys, WIDTH, PADDED)
    at = (batch * length * CHOSEN * heads + head) * WIDTH
    key_at = (batch * num_keys * heads + head) * WIDTH
    if ADD:
        summed_k = _load(grad_k + key_at, keys, heads * WIDTH, keys < num_keys, WIDTH, PADDED)
        summed_v = _load(grad_v + key_at, keys, heads * WIDTH, keys < num_keys, WIDTH, PADDED)
    else:
        summed_k = tl.zeros([KEYS, PADDED], tl.float32)
        summed_v = tl.zeros([KEYS, PADDED], tl.float32)
    first_row = tl.maximum(tile * KEYS - (num_keys - length), 0) * CHOSEN
    for own in range(tl.maximum(first_row // ROWS - first_block, 0), num_blocks):
        if tl.load(first_tiles + pair * num_blocks + own) <= tile:
            rows = (first_block + own) * ROWS + tl.arange(0, ROWS)
            valid = rows < length * CHOSEN
            positions = num_keys - length + rows // CHOSEN
            first_keys = _load_starts(starts, batch, rows, valid, length, CHOSEN)
            queries = _load(q + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
            grads = _load(grad_out + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
            carried = ((pair.to(tl.int64) * num_tiles + tile) * num_blocks + own) * ROWS + tl.arange(0, ROWS)
            odds, left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)
            after = _break_stick(left, tl.load(sticks + carried), KEYS)[0]
            weights = after * odds
            summed_v += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
            g = weights * tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            grad_logits = (g - odds * left * (tl.load(sums + carried)[:, None] + tl.cumsum(g, 1))) * scale
            summed_k += tl.dot(tl.trans(grad_logits.to(queries.dtype)), queries, input_precision=PRECISION)
    _store(grad_k + key_at, keys, heads * WIDTH, keys < num_keys, summed_k, WIDTH, PADDED)
    _store(grad_v + key_at, keys, heads * WIDTH, keys < num_keys, summed_v, WIDTH, PADDED)


@triton.jit
def decode_kernel(
    q, k, v, starts, parts, lefts, k_batch, k_key, k_head, v_batch, v_key, v_head,
    num_keys, heads, num_splits, scale_log2,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a whole stick gives over one split of the keys, and what is left of it."""
    pair, split = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    batch, head = (pair // heads).to(tl.int64), pair % heads
    rows = tl.arange(0, ROWS)
    valid = rows < CHOSEN
    positions = tl.zeros_like(rows) + num_keys - 1
    first_keys = _load_starts(starts, batch, rows, valid, 1, CHOSEN)
    queries = _load(q + (batch * CHOSEN * heads + head) * WIDTH, rows, heads * WIDTH, valid, WIDTH, PADDED)
    k_at, v_at = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    stick = tl.where(valid, 1.0, 0.0)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    for step in range(TILES):
        keys = (split * TILES + TILES - 1 - step) * KEYS + tl.arange(0, KEYS)
        key_rows = _load(k_at, keys, k_key, keys < num_keys, WIDTH, PADDED)
        odds, left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)
        after, stick = _break_stick(left, stick, KEYS)
        values = _load(v_at, keys, v_key, keys < num_keys, WIDTH, PADDED)
        summed += tl.dot((after * odds).to(values.dtype), values, input_precision=PRECISION)
    at = tl.program_id(0).to(tl.int64) * CHOSEN
    _store(parts + at * WIDTH, rows, WIDTH, valid, summed, WIDTH, PADDED)
    tl.store(lefts + at + rows, stick, mask=valid)


@triton.jit
def join_kernel(
    parts, lefts, out, heads, num_splits,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The splits' parts, from the newest on, each times what is left of the stick before it."""
    pair = tl.program_id(0)
    batch, head = (pair // heads).to(tl.int64), pair % heads
    rows = tl.arange(0, ROWS)
    valid = rows < CHOSEN
    stick = tl.where(valid, 1.0, 0.0)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    for step in range(num_splits):
        at = (pair.to(tl.int64) * num_splits + num_splits - 1 - step) * CHOSEN
        summed += stick[:, None] * _load(parts + at * WIDTH, rows, WIDTH, valid, WIDTH, PADDED)
        stick *= tl.load(lefts + at + rows, mask=valid, other=0.0)
    _store(out + (batch * CHOSEN * heads + head) * WIDTH, rows, heads * WIDTH, valid, summed, WIDTH, PADDED)


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j, memory O(T + S)."""
    o_BTKHC: Tensor = _Stickbreaking.apply(q_BTKHC, k_BSHC, v_BSHC, starts_BT)  # type: ignore[no-untyped-call]
    return o_BTKHC


def stickbreaking_decode(q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None) -> Tensor:
    """One query at the last key; without gradients its keys are split among programs, so that few heads fill a card."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q_BKHC, k_BSHC, v_BSHC)):
        starts_BT = None if starts_B is None else starts_B.unsqueeze(1)
        return stickbreaking_attention(q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, starts_BT).squeeze(1)
    call = _Call.of(q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, None if starts_B is None else starts_B.unsqueeze(1))
    return _decode(call).squeeze(1)


def decode_folded(q_XKC: Tensor, k_XSC: Tensor, v_XSC: Tensor) -> Tensor:
    """o_XKC for X (batch, head) pairs, each a batch row of one head."""
    q_X1K1C = q_XKC.unsqueeze(2).unsqueeze(1)
    return _decode(_Call.of(q_X1K1C, k_XSC.unsqueeze(2), v_XSC.unsqueeze(2), None)).view_as(q_XKC)


@dataclass(frozen=True)
class _Call:
    """The tensors of one call as the kernels read them (numbers of a row side by side), and its sizes."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts: Tensor | None

    @classmethod
    def of(cls, q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> _Call:
        k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (k_BSHC, v_BSHC))
        return cls(q_BTKHC.contiguous(), k, v, None if starts_BT is None else starts_BT.contiguous())

    @property
    def pairs(self) -> int:
        return self.k.shape[0] * self.k.shape[2]

    @property
    def num_rows(self) -> int:
        """Of each pair."""
        return self.q.shape[1] * self.q.shape[2]

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def key_strides(self) -> tuple[int, ...]:
        return self.k.stride()[:3]

    @property
    def value_strides(self) -> tuple[int, ...]:
        return self.v.stride()[:3]

    def constants(self, config: Config) -> dict[str, Any]:
        width = self.q.shape[-1]
        return {
            "CHOSEN": self.q.shape[2],
            "WIDTH": width,
            "PADDED": max(16, triton.next_power_of_2(width)),
            "ROWS": config.rows,
            "KEYS": config.columns,
            "PRECISION": "ieee",
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


class _Stickbreaking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
        call = _Call.of(q_BTKHC, k_BSHC, v_BSHC, starts_BT)
        ctx.save_for_backward(call.q, call.k, call.v, call.starts)
        with on_device_of(q_BTKHC):
            return _forward(call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTKHC: Tensor) -> tuple[Tensor | None, ...]:
        with on_device_of(grad_BTKHC):
            return *_backward(_Call(*ctx.saved_tensors), grad_BTKHC.contiguous()), None


def _forward(call: _Call) -> Tensor:
    config = config_for("attention_forward", call.q, call.q.shape[-1])
    out = torch.empty_like(call.q)
    num_blocks = triton.cdiv(call.num_rows, config.rows)
    if out.numel():
        forward_kernel[(call.pairs * num_blocks,)](
            call.q, call.k, call.v, call.starts, out, *call.key_strides, *call.value_strides,
            call.q.shape[1], call.k.shape[1], call.k.shape[2], num_blocks, call.scale * LOG2_E,
            **call.constants(config),
        )  # fmt: skip
    return out


def _backward(call: _Call, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    config = config_for("attention_backward", call.q, call.q.shape[-1])
    constants = call.constants(config)
    q, k, v, starts = call.q, call.k, call.v, call.starts
    length, num_keys, heads = q.shape[1], k.shape[1], k.shape[2]
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.empty(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    if not q.numel():
        return grad_q, torch.zeros_like(k), torch.zeros_like(v)
    num_tiles, all_blocks = triton.cdiv(num_keys, config.columns), triton.cdiv(call.num_rows, config.rows)
    most = min(all_blocks, max(1, CARRIED_BYTES // (8 * call.pairs * num_tiles * config.rows)))
    sticks, sums = (torch.empty(call.pairs * num_tiles * most * config.rows, device=q.device) for _ in range(2))
    first_tiles = torch.empty(call.pairs * most, dtype=torch.int32, device=q.device)
    for first in range(0, all_blocks, most):
        num_blocks = min(most, all_blocks - first)
        sizes = length, num_keys, heads, num_blocks, first, num_tiles, call.scale * LOG2_E
        by_rows, by_keys = (call.pairs * num_blocks,), (call.pairs * num_tiles,)
        sticks_kernel[by_rows](q, k, starts, sticks, first_tiles, *call.key_strides, *sizes, **constants)
        grad_queries_kernel[by_rows](
            q, k, v, starts, grad_out, sticks, sums, first_tiles, grad_q, *call.key_strides, *call.value_strides,
            *sizes, call.scale, **constants,
        )  # fmt: skip
        grad_keys_kernel[by_keys](
            q, k, v, starts, grad_out, sticks, sums, first_tiles, grad_k, grad_v, *call.key_strides,
            *call.value_strides, *sizes, call.scale, **constants, ADD=first > 0,
        )  # fmt: skip
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _decode(call: _Call) -> Tensor:
    config = config_for("attention_decode", call.q, call.q.shape[-1])
    constants = call.constants(config) | {"ROWS": max(config.rows, triton.next_power_of_2(call.num_rows))}
    num_keys, heads = call.k.shape[1], call.k.shape[2]
    num_splits = triton.cdiv(num_keys, config.columns * TILES_PER_SPLIT)
    parts, lefts = (
        torch.empty(call.pairs, num_splits, call.num_rows, width, device=call.q.device)
        for width in (call.q.shape[-1], 1)
    )
    out = torch.empty_like(call.q)
    joined = {name: constants[name] for name in ("CHOSEN", "WIDTH", "PADDED", "ROWS", "num_warps")}
    with on_device_of(out):
        decode_kernel[(call.pairs * num_splits,)](
            call.q, call.k, call.v, call.starts, parts, lefts, *call.key_strides, *call.value_strides,
            num_keys, heads, num_splits, call.scale * LOG2_E, **constants, TILES=TILES_PER_SPLIT,
        )  # fmt: skip
        join_kernel[(call.pairs,)](parts, lefts, out, heads, num_splits, **joined)
    return out
