"""Stick-breaking attention on a GPU for heads too wide for registers: torch's products, and one kernel between them.

A stripe of queries [first, last) meets the keys up to `last`: torch.bmm multiplies them into a buffer of scores (pairs,
rows, keys) of at most ELEMENTS numbers, so memory is linear in T; the kernel turns scores into weights (backward: and
into the logits' gradients), which are multiplied again. A width is then only the depth of a product. Backward takes
the scores' product anew. Stripes follow one another, so the sums of dK and dV have one order. Scores, dA, dK and dV are
fp32 in every dtype: a logit rounded to 16 bits would be off by more than all else together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.autograd import applied
from mfext_kernels.backends import on_device_of
from mfext_kernels.stickbreaking.wide_kernels import wide_backward_kernel, wide_forward_kernel
from mfext_kernels.tuning import Config, config_for

LOG2_E = 1.4426950408889634
ELEMENTS = 1 << 26  # of one buffer: 256 MiB in fp32
QUERIES = 512  # of a stripe at most: longer ones multiply more of what no query sees
ALIGNED = 16  # numbers; rows of weights start at multiples, which products in 16 bits read faster


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j, memory O(T + S + ELEMENTS)."""
    return applied(_Stickbreaking, q_BTKHC, k_BSHC, v_BSHC, starts_BT, None)


def stickbreaking_decode(
    q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None, ends_B: Tensor | None = None
) -> Tensor:
    """One query at the last key: a stripe of K rows a pair, and nothing waits for the card."""
    starts_BT = None if starts_B is None else starts_B.unsqueeze(1)
    ends_B = None if ends_B is None else ends_B.contiguous()
    return applied(_Stickbreaking, q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, starts_BT, ends_B).squeeze(1)


def decode_folded(q_XKC: Tensor, k_XSC: Tensor, v_XSC: Tensor) -> Tensor:
    """o_XKC for X (batch, head) pairs, each a batch row of one head."""
    return stickbreaking_decode(q_XKC.unsqueeze(2), k_XSC.unsqueeze(2), v_XSC.unsqueeze(2), None).squeeze(2)


@dataclass(frozen=True)
class _Stripe:
    """Rows of queries [first, last) of the pairs [pair, pair_end), and how many keys the last of them sees."""

    pair: int
    pair_end: int
    first: int
    last: int
    num_keys: int

    @property
    def keys(self) -> tuple[slice, slice]:
        return slice(self.pair, self.pair_end), slice(0, self.num_keys)


@dataclass(frozen=True)
class _Call:
    """The tensors of one call, folded to X = B * H pairs and R = T * K rows, and its sizes."""

    q_XRC: Tensor
    k_XSC: Tensor
    v_XSC: Tensor
    starts_BT: Tensor | None
    ends_B: Tensor | None
    length: int
    heads: int

    @property
    def chosen(self) -> int:
        return self.q_XRC.shape[1] // self.length

    @property
    def scale(self) -> float:
        return float(self.q_XRC.shape[-1] ** -0.5)

    def rows(self, stripe: _Stripe) -> tuple[slice, slice]:
        return slice(stripe.pair, stripe.pair_end), slice(stripe.first * self.chosen, stripe.last * self.chosen)

    def stripes(self) -> Iterator[_Stripe]:
        """As many queries as fit, then as many pairs."""
        pairs, num_keys = self.k_XSC.shape[:2]
        if not self.q_XRC.numel():
            return
        most = max(1, min(QUERIES, ELEMENTS // (self.chosen * num_keys)))
        for first in range(0, self.length, most):
            last = min(first + most, self.length)
            seen = num_keys - self.length + last
            step = max(1, ELEMENTS // ((last - first) * self.chosen * seen))
            for pair in range(0, pairs, step):
                yield _Stripe(pair, min(pair + step, pairs), first, last, seen)

    def sizes(self, stripe: _Stripe) -> tuple[int | float, ...]:
        """What both kernels are told of a stripe."""
        num_rows = (stripe.last - stripe.first) * self.chosen
        whole = stripe.pair, self.heads, self.length, self.k_XSC.shape[1]
        return *whole, stripe.first * self.chosen, num_rows, stripe.num_keys, self.scale * LOG2_E

    def grid(self, stripe: _Stripe, config: Config) -> tuple[int]:
        num_rows = (stripe.last - stripe.first) * self.chosen
        return ((stripe.pair_end - stripe.pair) * triton.cdiv(num_rows, config.rows),)

    def constants(self, config: Config) -> dict[str, int]:
        blocks = {"CHOSEN": self.chosen, "ROWS": config.rows, "KEYS": config.columns}
        return blocks | {"num_warps": config.warps, "num_stages": config.stages}


class _Stickbreaking(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None, ends_B: Tensor | None
    ) -> Tensor:
        starts_BT = None if starts_BT is None else starts_BT.contiguous()
        q_XRC, k_XSC, v_XSC = _fold_queries(q_BTKHC), _fold_keys(k_BSHC), _fold_keys(v_BSHC)
        ctx.save_for_backward(q_XRC, k_XSC, v_XSC, starts_BT)
        ctx.shape = q_BTKHC.shape
        call = _Call(q_XRC, k_XSC, v_XSC, starts_BT, ends_B, q_BTKHC.shape[1], q_BTKHC.shape[3])
        with on_device_of(q_XRC), torch.autocast(q_XRC.device.type, enabled=False):
            return _unfold_queries(_forward(call), q_BTKHC.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTKHC: Tensor) -> tuple[Tensor | None, ...]:
        q_XRC, k_XSC, v_XSC, starts_BT = ctx.saved_tensors
        call = _Call(q_XRC, k_XSC, v_XSC, starts_BT, None, ctx.shape[1], ctx.shape[3])
        with on_device_of(grad_BTKHC), torch.autocast(grad_BTKHC.device.type, enabled=False):
            grad_q, grad_k, grad_v = _backward(call, _fold_queries(grad_BTKHC))
            dtype = grad_q.dtype
            grads_keys = (_unfold_keys(each.to(dtype), call.heads) for each in (grad_k, grad_v))
            return _unfold_queries(grad_q, ctx.shape), *grads_keys, None, None


def _forward(call: _Call) -> Tensor:
    config = config_for("wide_decode" if call.length == 1 else "wide_forward", call.q_XRC)
    out_XRC = torch.empty_like(call.q_XRC)
    for stripe in call.stripes():
        _attend(call, stripe, config, out_XRC)
    return out_XRC


def _attend(call: _Call, stripe: _Stripe, config: Config, out_XRC: Tensor) -> None:
    at_rows = call.rows(stripe)
    scores = _product(call.q_XRC[at_rows], call.k_XSC[stripe.keys].transpose(1, 2))
    weights = _beside(scores, call.q_XRC.dtype)
    wide_forward_kernel[call.grid(stripe, config)](
        scores, call.starts_BT, call.ends_B, weights, weights.stride(1), *call.sizes(stripe), **call.constants(config)
    )
    torch.bmm(weights, call.v_XSC[stripe.keys], out=out_XRC[at_rows])


def _backward(call: _Call, grad_XRC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ in its dtype, dK and dV in fp32."""
    config = config_for("wide_backward", call.q_XRC)
    grad_q = torch.empty_like(call.q_XRC)
    grad_k, grad_v = (torch.zeros_like(call.k_XSC, dtype=torch.float32) for _ in range(2))
    for stripe in call.stripes():
        at_rows = call.rows(stripe)
        weights, grad_logits = _differentiate(call, stripe, config, grad_XRC[at_rows])
        # 16 bits hold the logits' gradients before they are scaled down: small ones would be lost in fp16.
        grad_q[at_rows].baddbmm_(grad_logits, call.k_XSC[stripe.keys], beta=0, alpha=call.scale)
        grad_k[stripe.keys].add_(_product(grad_logits.transpose(1, 2), call.q_XRC[at_rows]), alpha=call.scale)
        grad_v[stripe.keys].add_(_product(weights.transpose(1, 2), grad_XRC[at_rows]))
    return grad_q, grad_k, grad_v


def _differentiate(call: _Call, stripe: _Stripe, config: Config, grad_XRC: Tensor) -> tuple[Tensor, Tensor]:
    """A stripe's weights and its logits' gradients, (pairs, rows, keys)."""
    scores = _product(call.q_XRC[call.rows(stripe)], call.k_XSC[stripe.keys].transpose(1, 2))
    grads = _product(grad_XRC, call.v_XSC[stripe.keys].transpose(1, 2))
    weights, grad_logits = (_beside(scores, grad_XRC.dtype) for _ in range(2))
    wide_backward_kernel[call.grid(stripe, config)](
        scores, grads, call.starts_BT, weights, grad_logits, weights.stride(1), *call.sizes(stripe),
        **call.constants(config),
    )  # fmt: skip
    return weights, grad_logits


def _product(a_XMN: Tensor, b_XNP: Tensor) -> Tensor:
    """In fp32, contiguous. torch rounds a product of 16 bits to 16 bits unless told (2.8 or newer, on CUDA)."""
    if a_XMN.dtype == torch.float32:
        return torch.bmm(a_XMN, b_XNP)
    if a_XMN.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):
        return torch.bmm(a_XMN, b_XNP, out_dtype=torch.float32)
    return torch.bmm(a_XMN.float(), b_XNP.float())


def _beside(scores_XRS: Tensor, dtype: torch.dtype) -> Tensor:
    """An unwritten buffer of the scores' shape, its rows aligned."""
    pairs, num_rows, num_keys = scores_XRS.shape
    stride = triton.cdiv(num_keys, ALIGNED) * ALIGNED
    return torch.empty(pairs, num_rows, stride, dtype=dtype, device=scores_XRS.device)[..., :num_keys]


def _fold_queries(q_BTKHC: Tensor) -> Tensor:
    """(B, T, K, H, C) -> (B*H, T*K, C), contiguous; a view where there is one head."""
    return q_BTKHC.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1).contiguous()


def _fold_keys(k_BSHC: Tensor) -> Tensor:
    """(B, S, H, C) -> (B*H, S, C), the numbers of a row side by side."""
    k_XSC = k_BSHC.transpose(1, 2).flatten(0, 1)
    return k_XSC if k_XSC.stride(-1) == 1 else k_XSC.contiguous()


def _unfold_queries(rows_XRC: Tensor, shape: torch.Size) -> Tensor:
    batch, length, chosen, heads, width = shape
    return rows_XRC.view(batch, heads, length, chosen, width).permute(0, 2, 3, 1, 4).contiguous()


def _unfold_keys(keys_XSC: Tensor, heads: int) -> Tensor:
    pairs, num_keys, width = keys_XSC.shape
    return keys_XSC.view(pairs // heads, heads, num_keys, width).transpose(1, 2)
