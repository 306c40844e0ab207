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

import triton
import triton.language as tl

MOST_LOG2: tl.constexpr = tl.constexpr(60.0)
LEAST_STICK: tl.constexpr = tl.constexpr(2.0**-60)
# Between two looks at what is left of the sticks: a loop of known length is pipelined.
TILES_BETWEEN_LOOKS: tl.constexpr = tl.constexpr(4)
BLOCKS_AT_A_LOOK: tl.constexpr = tl.constexpr(128)
MOST_TILES: tl.constexpr = tl.constexpr(2**30)


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
def load_starts(starts, batch, rows, valid, length, CHOSEN: tl.constexpr):
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
def break_stick(left, stick, KEYS: tl.constexpr):
    """The stick left after each key of the tile, the newest the last column; and after the whole tile."""
    after = tl.cumprod(left, 1, reverse=True) * stick[:, None]
    whole = tl.sum(tl.where(tl.arange(0, KEYS)[None, :] == 0, after, 0.0), 1)
    return after, whole


@triton.jit
def _newest_first(tile, KEYS: tl.constexpr):
    """A tile's keys from the newest on: sticks are then broken along the columns.

    A scan against the columns, as `break_stick` has it, turns the tile round twice, which took a third of forward's
    time (H200, 2026-11). Backward scans both ways and gains nothing.
    """
    return tile * KEYS + KEYS - 1 - tl.arange(0, KEYS)


@triton.jit
def _break_newest_first(left, stick, KEYS: tl.constexpr):
    """As `break_stick`, the newest key the first column."""
    after = tl.cumprod(left, 1) * stick[:, None]
    whole = tl.sum(tl.where(tl.arange(0, KEYS)[None, :] == KEYS - 1, after, 0.0), 1)
    return after, whole


@triton.jit
def _times(left, right):
    return left * right


@triton.jit
def _newest_and_oldest(
    block, rows, first_keys, valid, length, num_keys, ROWS: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr
):
    """The tiles of the newest key any row of the block sees, and of the oldest."""
    last_row = tl.minimum((block + 1) * ROWS, length * CHOSEN) - 1
    oldest = tl.maximum(tl.min(tl.where(valid, first_keys, num_keys)), 0)
    return (num_keys - length + last_row // CHOSEN) // KEYS, oldest // KEYS


@triton.jit
def _block_of_rows(starts, heads, num_blocks, first_block, length, num_keys, CHOSEN: tl.constexpr, ROWS: tl.constexpr):
    """A program's pair, its block of rows among this launch's (the longest first), and what each row sees."""
    pair = tl.program_id(0) // num_blocks
    own = num_blocks - 1 - tl.program_id(0) % num_blocks
    batch, head = (pair // heads).to(tl.int64), pair % heads
    rows = (first_block + own) * ROWS + tl.arange(0, ROWS)
    valid = rows < length * CHOSEN
    positions = num_keys - length + rows // CHOSEN
    return pair, own, batch, head, rows, valid, positions, load_starts(starts, batch, rows, valid, length, CHOSEN)


@triton.jit
def forward_kernel(
    q, k, v, starts, out, k_batch, k_key, k_head, v_batch, v_key, v_head,
    length, num_keys, heads, num_blocks, scale_log2,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    _pair, own, batch, head, rows, valid, positions, first_keys = _block_of_rows(
        starts, heads, num_blocks, 0, length, num_keys, CHOSEN, ROWS
    )
    tile, oldest = _newest_and_oldest(own, rows, first_keys, valid, length, num_keys, ROWS, KEYS, CHOSEN)
    at = (batch * length * CHOSEN * heads + head) * WIDTH
    queries = _load(q + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
    k_at, v_at = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    stick = tl.where(valid, 1.0, 0.0)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    most_left = 1.0
    while (tile >= oldest) & (most_left > LEAST_STICK):
        count = tl.minimum(TILES_BETWEEN_LOOKS, tile - oldest + 1)
        for step in range(count):
            keys = _newest_first(tile - step, KEYS)
            key_rows = _load(k_at, keys, k_key, keys < num_keys, WIDTH, PADDED)
            odds, left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)
            after, stick = _break_newest_first(left, stick, KEYS)
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
    pair, own, batch, head, rows, valid, positions, first_keys = _block_of_rows(
        starts, heads, num_blocks, first_block, length, num_keys, CHOSEN, ROWS
    )
    tile, oldest = _newest_and_oldest(first_block + own, rows, first_keys, valid, length, num_keys, ROWS, KEYS, CHOSEN)
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
            stick *= tl.reduce(left, 1, _times)
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
    pair, own, batch, head, rows, valid, positions, first_keys = _block_of_rows(
        starts, heads, num_blocks, first_block, length, num_keys, CHOSEN, ROWS
    )
    newest = _newest_and_oldest(first_block + own, rows, first_keys, valid, length, num_keys, ROWS, KEYS, CHOSEN)[0]
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
        after = break_stick(left, tl.load(sticks + carried), KEYS)[0]
        values = _load(v_at, keys, v_key, keys < num_keys, WIDTH, PADDED)
        g = after * odds * tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        grad_logits = g - odds * left * (older[:, None] + tl.cumsum(g, 1))
        summed += tl.dot(grad_logits.to(key_rows.dtype), key_rows, input_precision=PRECISION)
        older += tl.sum(g, 1)
    _store(grad_q + at, rows, heads * WIDTH, valid, summed * scale, WIDTH, PADDED)


@triton.jit
def _last_to_meet(first_tiles, tile, first, num_blocks):
    """The last block of rows whose sticks reach a tile; the loop up to it has no branch, so that loads go ahead."""
    last = first - 1
    for start in range(first, num_blocks, BLOCKS_AT_A_LOOK):
        blocks = start + tl.arange(0, BLOCKS_AT_A_LOOK)
        reached = tl.load(first_tiles + blocks, mask=blocks < num_blocks, other=MOST_TILES) <= tile
        last = tl.maximum(last, tl.max(tl.where(reached, blocks, -1)))
    return last


@triton.jit
def grad_keys_kernel(
    q, k, v, starts, grad_out, sticks, sums, first_tiles, grad_k, grad_v,
    k_batch, k_key, k_head, v_batch, v_key, v_head,
    length, num_keys, heads, num_blocks, first_block, num_tiles, scale_log2, scale,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # The oldest keys first: most rows see them.
    pair, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
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
    first_own = tl.maximum(first_row // ROWS - first_block, 0)
    last_own = _last_to_meet(first_tiles + pair * num_blocks, tile, first_own, num_blocks)
    for own in range(first_own, last_own + 1):
        met = tl.load(first_tiles + pair * num_blocks + own) <= tile  # else no stick: all it adds is 0
        rows = (first_block + own) * ROWS + tl.arange(0, ROWS)
        valid = rows < length * CHOSEN
        positions = num_keys - length + rows // CHOSEN
        first_keys = load_starts(starts, batch, rows, valid, length, CHOSEN)
        queries = _load(q + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
        grads = _load(grad_out + at, rows, heads * WIDTH, valid, WIDTH, PADDED)
        carried = ((pair.to(tl.int64) * num_tiles + tile) * num_blocks + own) * ROWS + tl.arange(0, ROWS)
        odds, left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)
        after = break_stick(left, tl.load(sticks + carried, mask=valid & met, other=0.0), KEYS)[0]
        weights = after * odds
        summed_v += tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision=PRECISION)
        g = weights * tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        summed = tl.load(sums + carried, mask=valid & met, other=0.0)
        grad_logits = (g - odds * left * (summed[:, None] + tl.cumsum(g, 1))) * scale
        summed_k += tl.dot(tl.trans(grad_logits.to(queries.dtype)), queries, input_precision=PRECISION)
    _store(grad_k + key_at, keys, heads * WIDTH, keys < num_keys, summed_k, WIDTH, PADDED)
    _store(grad_v + key_at, keys, heads * WIDTH, keys < num_keys, summed_v, WIDTH, PADDED)


@triton.jit
def decode_kernel(
    q, k, v, starts, ends, parts, lefts, k_batch, k_key, k_head, v_batch, v_key, v_head,
    num_keys, heads, num_splits, scale_log2,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a whole stick gives over one split of the keys, and what is left of it."""
    pair, split = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    batch, head = (pair // heads).to(tl.int64), pair % heads
    rows = tl.arange(0, ROWS)
    valid = rows < CHOSEN
    end = num_keys
    if ends is not None:
        end = tl.load(ends + batch).to(tl.int32)
    positions = tl.zeros_like(rows) + end - 1
    first_keys = load_starts(starts, batch, rows, valid, 1, CHOSEN)
    queries = _load(q + (batch * CHOSEN * heads + head) * WIDTH, rows, heads * WIDTH, valid, WIDTH, PADDED)
    k_at, v_at = k + batch * k_batch + head * k_head, v + batch * v_batch + head * v_head
    stick = tl.where(valid, 1.0, 0.0)
    summed = tl.zeros([ROWS, PADDED], tl.float32)
    for step in range(TILES):
        keys = _newest_first(split * TILES + TILES - 1 - step, KEYS)
        key_rows = _load(k_at, keys, k_key, keys < end, WIDTH, PADDED)
        odds, left = _odds_and_left(queries, key_rows, keys, positions, first_keys, valid, scale_log2, PRECISION)
        after, stick = _break_newest_first(left, stick, KEYS)
        values = _load(v_at, keys, v_key, keys < end, WIDTH, PADDED)
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
