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

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mfext_kernels.autograd import applied
from mfext_kernels.stickbreaking import compiled
from mfext_kernels.stickbreaking.blocks import TILE, Block, Gradients, Operands, Plan
from mfext_kernels.stickbreaking.torch_sticks import TorchSticks


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j, memory O(block * S); by compiled code where that applies."""
    if compiled.applies(q_BTKHC):
        return compiled.stickbreaking_attention(q_BTKHC, k_BSHC, v_BSHC, starts_BT)
    return applied(_Stickbreaking, q_BTKHC, k_BSHC, v_BSHC, starts_BT)


def stickbreaking_decode(
    q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None, ends_B: Tensor | None = None
) -> Tensor:
    """One query at the last key; under no_grad a few small products, else the blocked op with T = 1."""
    if ends_B is not None:
        # Nothing waits for a device here: keys that do not exist yet are moved before the row's first key.
        room = k_BSHC.shape[1]
        order_BS = (torch.arange(room, device=ends_B.device) + ends_B.unsqueeze(1)) % room
        k_BSHC, v_BSHC = (each.take_along_dim(order_BS[:, :, None, None], 1) for each in (k_BSHC, v_BSHC))
        starts_B = (0 if starts_B is None else starts_B.clamp(min=0)) + room - ends_B
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
            plan = Plan.make(q_BTKHC, k_BSHC, starts_BT)
            out, blocks = _forward(*folded, plan)
        ctx.save_for_backward(*folded)
        ctx.plan, ctx.blocks, ctx.dtype = plan, blocks, q_BTKHC.dtype
        return _unfold_queries(out, plan).to(q_BTKHC.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BTKHC: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
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


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, list[Block]]:
    """Output rows, and the blocks of work with the number of keys each really met."""
    out = torch.zeros_like(q)
    sticks = TorchSticks(plan, q, min(TILE, plan.num_keys))
    done = []
    for block in plan.blocks():
        left, first = None, 0
        while first < block.num_keys:
            last = min(first + TILE, block.num_keys)
            keys = block.keys(first, last)
            tile = Operands(q[block.pairs, plan.rows(block)], k[block.pairs, keys], v[block.pairs, keys])
            left = sticks.attend(block, first, tile, out[block.pairs, plan.rows(block)], left)
            first = last
            if first < block.num_keys and float(left.amax()) < torch.finfo(q.dtype).tiny:
                break
        done.append(replace(block, num_keys=first))
    return out, done


def _backward(
    folded: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, plan: Plan, blocks: list[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = folded
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    sticks = TorchSticks(plan, q, max((block.num_keys for block in blocks), default=0))
    for whole in blocks:
        step = plan.pairs_at_once(whole.last - whole.first, whole.num_keys)
        for pair in range(whole.pair, whole.pair_end, step):
            block = replace(whole, pair=pair, pair_end=min(pair + step, whole.pair_end))
            at_rows = (block.pairs, plan.rows(block))
            at_keys = (block.pairs, block.keys(0, block.num_keys))
            operands = Operands(q[at_rows], k[at_keys], v[at_keys], grad_out[at_rows])
            sticks.differentiate(block, operands, Gradients(grad_q[at_rows], grad_k[at_keys], grad_v[at_keys]))
    return grad_q, grad_k, grad_v


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


def _unfold_queries(rows: Tensor, plan: Plan) -> Tensor:
    return rows.view(plan.batch, plan.heads, plan.length, plan.chosen, plan.width).permute(0, 2, 3, 1, 4).contiguous()


def _unfold_keys(rows: Tensor, plan: Plan) -> Tensor:
    return rows.view(plan.batch, plan.heads, plan.num_keys, plan.width).transpose(1, 2).flip(1)
