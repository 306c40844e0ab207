"""Stick-breaking attention, fast: blocks of queries in linear space, recomputed in backward.

Keys and values are stored reversed, so the stick is a plain cumulative product along a row of
p = sigmoid(-l): c_r = prod of p up to r, and the weight is a_r = c_{r-1} - c_r (c_{-1} = 1). p is computed
directly, so nothing cancels and underflow of c is the right limit: no stick left. An invisible key has
p = 1, which takes nothing. Backward, per block, needs no logarithm and no division: with g = dA * a,
dl_m = g_m - sigmoid(l_m) * sum over j <= m of g_j. Only the newest key block meets the causal mask, and a
block meets the starts mask only where a start lies behind the block's first key. Rows of a block are
(query, chosen expert) pairs: the K experts' queries are folded onto the shared keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUERIES = 64  # per block
ELEMENTS = 1 << 18  # of one score block: 1 MiB in fp32, what a core's second-level cache holds


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j, memory O(block * S)."""
    o_BTKHC: Tensor = _Stickbreaking.apply(q_BTKHC, k_BSHC, v_BSHC, starts_BT)  # type: ignore[no-untyped-call]
    return o_BTKHC


def stickbreaking_decode(q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None) -> Tensor:
    """One query at the last key; under no_grad a few small products, else the blocked op with T = 1."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q_BKHC, k_BSHC, v_BSHC)):
        starts_BT = None if starts_B is None else starts_B.unsqueeze(1)
        return stickbreaking_attention(q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, starts_BT).squeeze(1)
    exact = _exact(q_BKHC.dtype)
    with torch.autocast(q_BKHC.device.type, enabled=False):
        q_BHKC = (q_BKHC.to(exact) * -(q_BKHC.shape[-1] ** -0.5)).transpose(1, 2)
        left_BHKS = torch.matmul(q_BHKC, k_BSHC.to(exact).permute(0, 2, 3, 1)).sigmoid_()
        if starts_B is not None:
            keys_S = torch.arange(k_BSHC.shape[1], device=k_BSHC.device)
            left_BHKS.masked_fill_((keys_S < starts_B.unsqueeze(1))[:, None, None, :], 1.0)
        stick_BHKS = left_BHKS.flip(-1).cumprod(-1)
        weights_BHKS = _differences(stick_BHKS, torch.empty_like(stick_BHKS)).flip(-1)
        return torch.matmul(weights_BHKS, v_BSHC.to(exact).transpose(1, 2)).transpose(1, 2).to(q_BKHC.dtype)


class _Stickbreaking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
        with torch.autocast(q_BTKHC.device.type, enabled=False):
            folded = _fold_queries(q_BTKHC).mul_(-(q_BTKHC.shape[-1] ** -0.5)), _fold_keys(k_BSHC), _fold_keys(v_BSHC)
            plan = _Plan.make(q_BTKHC, k_BSHC, starts_BT)
            out = _forward(*folded, plan)
        ctx.save_for_backward(*folded)
        ctx.plan, ctx.dtype = plan, q_BTKHC.dtype
        return _unfold_queries(out, plan).to(q_BTKHC.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BTKHC: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        with torch.autocast(grad_BTKHC.device.type, enabled=False):
            queries, keys, values = ctx.saved_tensors
            grads_q, grads_k, grads_v = _backward((queries, keys, values), _fold_queries(grad_BTKHC), plan)
            grads_q.mul_(plan.width**-0.5)
        return (
            _unfold_queries(grads_q, plan).to(ctx.dtype),
            _unfold_keys(grads_k, plan).to(ctx.dtype),
            _unfold_keys(grads_v, plan).to(ctx.dtype),
            None,
        )


@dataclass(frozen=True)
class _Block:
    """Queries [first, last) of the (batch, head) pairs [pair, pair_end) against reversed keys [newest, newest + num_keys)."""

    pair: int
    pair_end: int
    first: int
    last: int
    newest: int
    num_keys: int
    masked_from: int
    starts: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """The shape of one call, its starts, and per query block the least and greatest start of each batch row."""

    batch: int
    length: int
    chosen: int
    heads: int
    width: int
    keys: int
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
            starts_BT = None if all(start == 0 for block in greatest for start in block) else starts_BT
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
                num_keys, masked_from, starts = self.keys - newest, self.keys, None
                if self.starts_BT is not None:
                    num_keys -= self.least[number][row]
                    if self.greatest[number][row] > self.least[number][row]:
                        masked_from = max(0, self.keys - newest - self.greatest[number][row])
                        starts = self.starts_BT[row, first:last]
                if num_keys <= 0:
                    continue
                pairs = max(1, ELEMENTS // ((last - first) * self.chosen * num_keys))
                for pair in range(group_first, group_first + group, pairs):
                    yield _Block(pair, min(pair + pairs, group_first + group), first, last, newest, num_keys, masked_from, starts)

    def scratch(self, like: Tensor, count: int) -> list[Tensor]:
        """Flat buffers that hold the largest block; reused, since fresh pages cost more than the arithmetic."""
        queries = min(QUERIES, self.length) * self.chosen
        pairs = self.heads if self.starts_BT is not None else self.batch * self.heads
        size = max(queries * self.keys, min(ELEMENTS, queries * self.keys * pairs))
        return [like.new_empty(size) for _ in range(count)]


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
    out = torch.zeros_like(q)
    buffers = plan.scratch(q, 3)
    for block in plan.blocks():
        rows, keys = _rows(block, plan), slice(block.newest, block.newest + block.num_keys)
        pairs = slice(block.pair, block.pair_end)
        left, stick, weights = _views(buffers, block, plan)
        _weights(q[pairs, rows], k[pairs, keys], block, plan, (left, stick, weights))
        torch.bmm(weights, v[pairs, keys], out=out[pairs, rows])
    return out


def _backward(folded: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = folded
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    buffers = plan.scratch(q, 3)
    for block in plan.blocks():
        rows, keys = _rows(block, plan), slice(block.newest, block.newest + block.num_keys)
        pairs = slice(block.pair, block.pair_end)
        left, total, grad = _views(buffers, block, plan)
        queries, grads = q[pairs, rows], grad_out[pairs, rows]
        _weights(queries, k[pairs, keys], block, plan, (left, total, grad))
        grad_v[pairs, keys].baddbmm_(grad.transpose(1, 2), grads)
        torch.bmm(grads, v[pairs, keys].transpose(1, 2), out=total)
        grad.mul_(total)  # g
        torch.cumsum(grad, -1, out=total)
        total.sub_(total[..., -1:].clone())  # minus the sum of g over strictly older keys
        grad.sub_(total)  # the sum over j <= m of g_j
        total.addcmul_(left, grad)  # dl = p * sum - older sum, the same as g - sigmoid(l) * sum
        torch.bmm(total, k[pairs, keys], out=grad_q[pairs, rows])
        grad_k[pairs, keys].baddbmm_(total.transpose(1, 2), queries, alpha=-1)
    return grad_q, grad_k, grad_v


def _weights(queries: Tensor, keys: Tensor, block: _Block, plan: _Plan, buffers: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fill buffers with p = sigmoid(-l), the stick left c, and the weights a; `queries` carry the factor -1/sqrt(C)."""
    left, stick, weights = buffers
    torch.bmm(queries, keys.transpose(1, 2), out=left)
    left.sigmoid_()
    num_queries = block.last - block.first
    by_query = left.view(left.shape[0], num_queries, plan.chosen, block.num_keys)
    diagonal = min(num_queries, block.num_keys)
    ahead = torch.ones(num_queries, num_queries, dtype=torch.bool, device=left.device).triu_(1).flip(1)
    by_query[..., :diagonal].masked_fill_(ahead[:, None, :diagonal], 1.0)
    if block.starts is not None:
        newest_key = plan.keys - block.newest - 1
        keys_n = torch.arange(newest_key - block.masked_from, newest_key - block.num_keys, -1, device=left.device)
        by_query[..., block.masked_from :].masked_fill_((keys_n < block.starts.unsqueeze(1))[:, None, :], 1.0)
    torch.cumprod(left, -1, out=stick)
    _differences(stick, weights)


def _differences(stick: Tensor, out: Tensor) -> Tensor:
    """a_r = c_{r-1} - c_r with c_{-1} = 1."""
    torch.sub(stick[..., :-1], stick[..., 1:], out=out[..., 1:])
    out[..., 0] = 1.0 - stick[..., 0]
    return out


def _views(buffers: list[Tensor], block: _Block, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    shape = (block.pair_end - block.pair, (block.last - block.first) * plan.chosen, block.num_keys)
    size = shape[0] * shape[1] * shape[2]
    left, second, third = (buffer[:size].view(shape) for buffer in buffers)
    return left, second, third


def _rows(block: _Block, plan: _Plan) -> slice:
    return slice(block.first * plan.chosen, block.last * plan.chosen)


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
    return rows.view(plan.batch, plan.heads, plan.keys, plan.width).transpose(1, 2).flip(1)
