"""Stick-breaking attention, written for reading: the whole T x S matrix in log space, plain autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stickbreaking_weights(q_BTKHC: Tensor, k_BSHC: Tensor, starts_BT: Tensor | None = None) -> Tensor:
    """The attention weights a_BKHTS, for inspection and golden files. T x S memory."""
    length, keys = q_BTKHC.shape[1], k_BSHC.shape[1]
    logits_BKHTS = torch.einsum("btkhc,bshc->bkhts", q_BTKHC, k_BSHC) / q_BTKHC.shape[-1] ** 0.5
    positions_T1 = torch.arange(keys - length, keys, device=k_BSHC.device).unsqueeze(1)
    keys_S = torch.arange(keys, device=k_BSHC.device)
    visible = keys_S <= positions_T1
    if starts_BT is not None:
        visible = visible & (keys_S >= starts_BT[:, None, None, :, None])
    log_taken = F.logsigmoid(logits_BKHTS)
    log_left = F.logsigmoid(-logits_BKHTS).masked_fill(~visible, 0.0)
    log_left_after = log_left.flip(-1).cumsum(-1).flip(-1) - log_left
    return torch.exp(log_taken + log_left_after).masked_fill(~visible, 0.0)


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j."""
    exact = torch.float32 if q_BTKHC.dtype == torch.bfloat16 else q_BTKHC.dtype
    weights_BKHTS = stickbreaking_weights(q_BTKHC.to(exact), k_BSHC.to(exact), starts_BT)
    return torch.einsum("bkhts,bshc->btkhc", weights_BKHTS, v_BSHC.to(exact)).to(q_BTKHC.dtype)


def stickbreaking_decode(
    q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None, ends_B: Tensor | None = None
) -> Tensor:
    """One query at the last key, row by row where rows have different last keys."""
    if ends_B is not None:
        rows = [(slice(row, row + 1), end) for row, end in enumerate(ends_B.tolist())]
        starts = [None if starts_B is None else starts_B[row] for row, _ in rows]
        each = zip(rows, starts, strict=True)
        return torch.cat([stickbreaking_decode(q_BKHC[r], k_BSHC[r, :e], v_BSHC[r, :e], s) for (r, e), s in each])
    starts_BT = None if starts_B is None else starts_B.unsqueeze(1)
    return stickbreaking_attention(q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, starts_BT).squeeze(1)
