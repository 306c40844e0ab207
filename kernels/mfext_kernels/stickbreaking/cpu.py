"""Stick-breaking attention, fast: blocks of queries in linear space, recomputed in backward.

Keys and values are stored reversed, so the stick is a plain cumulative product along a row of
p = sigmoid(-l): c_r = prod of p up to r, and the weight is a_r = c_{r-1} - c_r (c_{-1} = 1). p is computed
directly, so nothing cancels and underflow of c is the right limit: no stick left. An invisible key has
p = 1, which takes nothing. A block walks its keys from the newest in tiles and stops once no row has a
normal number of stick left: what older keys could take is below the smallest normal number, and so are
their gradients. Backward repeats exactly the keys that forward met, and needs no logarithm and no division:
with g = dA * a, dl_m = g_m - sigmoid(l_m) * sum over j <= m of g_j.
Only a block's newest keys meet the causal mask, and a block meets the starts mask only where a start lies
behind the block's first key. Rows of a block are (query, chosen expert) pairs: the K experts' queries are
folded onto the shared keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mfext_kernels.autograd import applied

QUERIES = 64  # per block
TILE = 256  # keys a block takes at a time before it asks whether any stick is left
ELEMENTS = 1 << 18  # of one score block: 1 MiB in fp32, what a core's second-level cache holds


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j, memory O(block * S)."""
    return applied(_Stickbreaking, q_BTKHC, k_BSHC, v_BSHC, starts_BT)


def stickbreaking_decode(q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None) -> Tensor:
    """One query at the last key; under no_grad a few small products, else the blocked op with T = 1."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q_BKHC, k_BSHC, v_BSHC)):
        starts_BT = None if starts_B is None else starts_B.unsqueeze(1)
        return stickbreaking_attention(q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, starts_BT).squeeze(1)
    exact = _exact(q_BKHC.dtype)
    if starts_B is not None and int(starts_B.max()) <= 0:
        starts_B = None
    if torch.is_autocast_enabled(q_BKHC.device.type):
        with torch.autocast(q_BKHC.device.type, enabled=False):
            return _decode(q_BKHC.to(exact), k_BSHC.to(exact), v_BSHC.to(exact), starts_B).to(q_BKHC.dtype)
    return _decode(q_BKHC.to(exact), k_BSHC.to(exact), v_BSHC.to(exact), starts_B).to(q_BKHC.dtype)


def _decode(q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None) -> Tensor:
    batch, chosen, heads, width = q_BKHC.shape
    q_XKC, k_XSC, v_XSC = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (q_BKHC, k_BSHC, v_BSHC))
    starts_X = None if starts_B is None else starts_B.repeat_interleave(heads)
    o_XKC = decode_folded(q_XKC, k_XSC, v_XSC, starts_X)
    return o_XKC.view(batch, heads, chosen, width).transpose(1, 2)


def decode_folded(q_XKC: Tensor, k_XSC: Tensor, v_XSC: Tensor, starts_X: Tensor | None = None) -> Tensor:
    """o_XKC for X (batch, head) pairs; the nearest keys first, and no others where these take the whole stick."""
    q_XKC = q_XKC * -(q_XKC.shape[-1] ** -0.5)
    keys = k_XSC.shape[1]
    if keys > 2 * TILE:
        near, left = _decode_from(keys - TILE, q_XKC, (k_XSC, v_XSC), starts_X)
        if float(left.amax()) < torch.finfo(q_XKC.dtype).tiny:
            return near
    return _decode_from(0, q_XKC, (k_XSC, v_XSC), starts_X)[0]


def _decode_from(
    first: int, q_XKC: Tensor, keys_values: tuple[Tensor, Tensor], starts_X: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o_XKC over the keys from number `first` on, and how much stick each row has left before them."""
    k_XSC, v_XSC = (tensor[:, first:] for tensor in keys_values) if first else keys_values
    left_XKS = torch.bmm(q_XKC, k_XSC.transpose(1, 2)).sigmoid_()
    if starts_X is not None:
        keys_S = torch.arange(first, first + k_XSC.shape[1], device=k_XSC.device)
        left_XKS.masked_fill_((keys_S < starts_X.unsqueeze(1)).unsqueeze(1), 1.0)
    # A whole stick, then from the newest key c_0 = p_0, c_1 = p_0 p_1, ...: in the keys' order a_j = c_{j+1} - c_j.
    stick_XKS = torch.constant_pad_nd(left_XKS, (0, 1), 1.0).flip(-1).cumprod_(-1).flip(-1)
    return torch.bmm(stick_XKS.diff(), v_XSC), stick_XKS[..., 0]


class _Stickbreaking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
        with torch.autocast(q_BTKHC.device.type, enabled=False):
            folded = _fold_queries(q_BTKHC).mul_(-(q_BTKHC.shape[-1] ** -0.5)), _fold_keys(k_BSHC), _fold_keys(v_BSHC)
            plan = _Plan.make(q_BTKHC, k_BSHC, starts_BT)
            out, blocks = _forward(*folded, plan)
        ctx.save_for_backward(*folded)
        ctx.plan, ctx.blocks, ctx.dtype = plan, blocks, q_BTKHC.dtype
        return _unfold_queries(out, plan).to(q_BTKHC.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BTKHC: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        with torch.autocast(grad_BTKHC.device.type, enabled=False):
            queries, keys, values = ctx.saved_tensors
            grads_q, grads_k, grads_v = _backward((queries, keys, values), _fold_queries(grad_BTKHC), plan, ctx.blocks)
            grads_q.mul_(plan.width**-0.5)
        return (
            _unfold_queries(grads_q, plan).to(ctx.dtype),
            _unfold_keys(grads_k, plan).to(ctx.dtype),
            _unfold_keys(grads_v, plan).to(ctx.dtype),
            None,
        )


@dataclass(frozen=True)
class _Block:
    """Queries [first, last) of the (batch, head) pairs [pair, pair_end), and their reversed keys from `newest` on.

    Where `starts` is given, keys from number `masked_from` of the block on may lie before a query's start.
    """

    pair: int
    pair_end: int
    first: int
    last: int
    newest: int
    num_keys: int
    masked_from: int
    starts: Tensor | None

    @property
    def pairs(self) -> slice:
        return slice(self.pair, self.pair_end)

    def keys(self, first: int, last: int) -> slice:
        return slice(self.newest + first, self.newest + last)


@dataclass(frozen=True)
class _Plan:
    """The shape of one call, its starts, and per query block the least and greatest start of each batch row."""

    batch: int
    length: int
    chosen: int
    heads: int
    width: int
    num_keys: int
    starts_BT: Tensor | None
    least: list[list[int]]
    greatest: list[list[int]]

    @classmethod
    def make(cls, q_BTKHC: Tensor, k_BSHC: Tensor, starts_BT: Tensor | None) -> _Plan:
        least: list[list[int]] = []
        greatest: list[list[int]] = []
        if starts_BT is not None:
            blocks = torch.split(starts_BT.detach().clamp(min=0), QUERIES, dim=1)
            least = torch.stack([block.amin(1) for block in blocks]).tolist()
            greatest = torch.stack([block.amax(1) for block in blocks]).tolist()
            starts_BT = starts_BT if any(start for block in greatest for start in block) else None
        batch, length, chosen, heads, width = q_BTKHC.shape
        return cls(batch, length, chosen, heads, width, k_BSHC.shape[1], starts_BT, least, greatest)

    def blocks(self) -> Iterator[_Block]:
        """Every block of work, small enough to stay in cache; with starts a block stays inside one batch row."""
        group = self.heads if self.starts_BT is not None else self.batch * self.heads
        for group_first in range(0, self.batch * self.heads, group):
            row = group_first // self.heads
            for number, first in enumerate(range(0, self.length, QUERIES)):
                last = min(first + QUERIES, self.length)
                newest = self.length - last
                num_keys, masked_from, starts = self.num_keys - newest, self.num_keys, None
                if self.starts_BT is not None:
                    masked_from = max(0, num_keys - self.greatest[number][row])
                    num_keys -= self.least[number][row]
                    if masked_from < num_keys:
                        starts = self.starts_BT[row, first:last]
                if num_keys <= 0:
                    continue
                step = self.pairs_at_once(last - first, min(num_keys, TILE))
                for pair in range(group_first, group_first + group, step):
                    end = min(pair + step, group_first + group)
                    yield _Block(pair, end, first, last, newest, num_keys, masked_from, starts)

    def pairs_at_once(self, num_queries: int, num_keys: int) -> int:
        """How many (batch, head) pairs' scores fit one buffer."""
        return max(1, ELEMENTS // (num_queries * self.chosen * num_keys))

    def rows(self, block: _Block) -> slice:
        """The block's rows among all T*K of a pair."""
        return slice(block.first * self.chosen, block.last * self.chosen)

    def scratch(self, like: Tensor, num_keys: int) -> list[Tensor]:
        """Flat buffers for the largest block; reused, since fresh pages cost more than the arithmetic."""
        size = min(QUERIES, self.length) * self.chosen * num_keys
        most = max(size, min(ELEMENTS, size * self.batch * self.heads))
        return [like.new_empty(most) for _ in range(3)]


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, list[_Block]]:
    """Output rows, and the blocks of work with the number of keys each really met."""
    out = torch.zeros_like(q)
    buffers = plan.scratch(q, min(TILE, plan.num_keys))
    done = []
    for block in plan.blocks():
        queries, out_rows = q[block.pairs, plan.rows(block)], out[block.pairs, plan.rows(block)]
        ahead = _ahead(block, q)
        left_before, first = None, 0
        while first < block.num_keys:
            last = min(first + TILE, block.num_keys)
            left, stick, weights = _views(buffers, queries, last - first)
            keys = block.keys(first, last)
            torch.bmm(queries, k[block.pairs, keys].transpose(1, 2), out=left)
            _mask(left, block, plan, ahead, first)
            _break_stick(left.sigmoid_(), stick, weights, left_before)
            if first == 0:
                torch.bmm(weights, v[block.pairs, keys], out=out_rows)
            else:
                out_rows.baddbmm_(weights, v[block.pairs, keys])
            first = last
            if first < block.num_keys:
                left_before = stick[..., -1].clone()
                if float(left_before.amax()) < torch.finfo(q.dtype).tiny:
                    break
        done.append(replace(block, num_keys=first))
    return out, done


def _backward(
    folded: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, plan: _Plan, blocks: list[_Block]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = folded
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    buffers = plan.scratch(q, max((block.num_keys for block in blocks), default=0))
    for whole in blocks:
        ahead = _ahead(whole, q)
        step = plan.pairs_at_once(whole.last - whole.first, whole.num_keys)
        for pair in range(whole.pair, whole.pair_end, step):
            block = replace(whole, pair=pair, pair_end=min(pair + step, whole.pair_end))
            at_rows = (block.pairs, plan.rows(block))
            at_keys = (block.pairs, block.keys(0, block.num_keys))
            queries, grads, keys, values = q[at_rows], grad_out[at_rows], k[at_keys], v[at_keys]
            left, total, grad = _views(buffers, queries, block.num_keys)
            torch.bmm(queries, keys.transpose(1, 2), out=left)
            _mask(left, block, plan, ahead, 0)
            _break_stick(left.sigmoid_(), total, grad, None)
            grad_v[at_keys].baddbmm_(grad.transpose(1, 2), grads)
            torch.bmm(grads, values.transpose(1, 2), out=total)
            grad.mul_(total)  # g
            torch.cumsum(grad, -1, out=total)
            total.sub_(total[..., -1:].clone())  # minus the sum of g over strictly older keys
            grad.sub_(total)  # the sum over j <= m of g_j
            total.addcmul_(left, grad)  # dl = p * sum - older sum, the same as g - sigmoid(l) * sum
            torch.bmm(total, keys, out=grad_q[at_rows])
            grad_k[at_keys].baddbmm_(total.transpose(1, 2), queries, alpha=-1)
    return grad_q, grad_k, grad_v


def _ahead(block: _Block, like: Tensor) -> Tensor:
    """Infinity where a block's newest keys (reversed) lie ahead of a query, else 0, shaped (queries, 1, keys)."""
    num_queries = block.last - block.first
    ahead = like.new_full((num_queries, num_queries), float("inf")).triu_(1)
    return ahead.flip(1).unsqueeze(1)


def _mask(logits: Tensor, block: _Block, plan: _Plan, ahead: Tensor, first: int) -> None:
    """Make -l infinite, and so p = 1, where a key is invisible; column 0 is the block's key number `first`.

    Adding infinity takes a quarter of masked_fill_'s time: a broadcast mask is walked one element at a time there.
    """
    num_queries, num_keys = block.last - block.first, logits.shape[-1]
    by_query = logits.view(logits.shape[0], num_queries, plan.chosen, num_keys)
    if first < num_queries:
        newest = ahead[..., first : first + num_keys]
        by_query[..., : newest.shape[-1]].add_(newest)
    skipped = max(0, block.masked_from - first)
    if block.starts is not None and skipped < num_keys:
        newest_key = plan.num_keys - 1 - block.newest - first
        keys = torch.arange(newest_key - skipped, newest_key - num_keys, -1, device=logits.device)
        before = (keys < block.starts.unsqueeze(1)).unsqueeze(1)
        by_query[..., skipped:].add_(logits.new_zeros(before.shape).masked_fill_(before, float("inf")))


def _break_stick(left: Tensor, stick: Tensor, weights: Tensor, left_before: Tensor | None) -> None:
    """From p fill the stick left c and the weights a_r = c_{r-1} - c_r; c_{-1} is 1 or what newer tiles left.

    A stick below tiny / eps^2 (8e-25 in fp32) counts as used up. By then the weights sum to 1 to far more digits than
    the type has, and what follows would be arithmetic on subnormal numbers, many times slower on some processors.
    """
    numbers = torch.finfo(stick.dtype)
    used_up = numbers.tiny / numbers.eps**2
    if left_before is None:
        torch.cumprod(left, -1, out=stick)
        torch.threshold_(stick, used_up, 0.0)
        weights[..., 0] = 1.0 - stick[..., 0]
    else:
        left[..., 0] *= left_before
        torch.cumprod(left, -1, out=stick)
        torch.threshold_(stick, used_up, 0.0)
        weights[..., 0] = left_before - stick[..., 0]
    torch.sub(stick[..., :-1], stick[..., 1:], out=weights[..., 1:])


def _views(buffers: list[Tensor], queries: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (queries.shape[0], queries.shape[1], num_keys)
    size = shape[0] * shape[1] * shape[2]
    left, second, third = (buffer[:size].view(shape) for buffer in buffers)
    return left, second, third


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _fold_queries(q_BTKHC: Tensor) -> Tensor:
    """(B, T, K, H, C) -> (B*H, T*K, C), a fresh contiguous tensor."""
    batch, length, chosen, heads, width = q_BTKHC.shape
    out = torch.empty(batch, heads, length, chosen, width, dtype=_exact(q_BTKHC.dtype), device=q_BTKHC.device)
    return out.copy_(q_BTKHC.permute(0, 3, 1, 2, 4)).view(batch * heads, length * chosen, width)


def _fold_keys(k_BSHC: Tensor) -> Tensor:
    """(B, S, H, C) -> (B*H, S, C), newest key first, contiguous."""
    folded = k_BSHC.flip(1).transpose(1, 2).to(_exact(k_BSHC.dtype))
    return folded.reshape(-1, *folded.shape[2:]).contiguous()


def _unfold_queries(rows: Tensor, plan: _Plan) -> Tensor:
    return rows.view(plan.batch, plan.heads, plan.length, plan.chosen, plan.width).permute(0, 2, 3, 1, 4).contiguous()


def _unfold_keys(rows: Tensor, plan: _Plan) -> Tensor:
    return rows.view(plan.batch, plan.heads, plan.num_keys, plan.width).transpose(1, 2).flip(1)
