"""Stick-breaking attention on a GPU: which kernel is launched on what (triton_kernels.py has the maths)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.autograd import applied
from mfext_kernels.backends import on_device_of
from mfext_kernels.stickbreaking.triton_kernels import (
    decode_kernel,
    forward_kernel,
    grad_keys_kernel,
    grad_queries_kernel,
    join_kernel,
    sticks_kernel,
)
from mfext_kernels.tuning import Config, config_for

LOG2_E = 1.4426950408889634
TILES_PER_SPLIT = 4
CARRIED_BYTES = 1 << 28


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j, memory O(T + S)."""
    return applied(_Stickbreaking, q_BTKHC, k_BSHC, v_BSHC, starts_BT)


def stickbreaking_decode(
    q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_B: Tensor | None, ends_B: Tensor | None = None
) -> Tensor:
    """One query at the last key; without gradients its keys are split among programs, so that few heads fill a card."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q_BKHC, k_BSHC, v_BSHC)):
        starts_BT = None if starts_B is None else starts_B.unsqueeze(1)
        return stickbreaking_attention(q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, starts_BT).squeeze(1)
    call = _Call.of(q_BKHC.unsqueeze(1), k_BSHC, v_BSHC, None if starts_B is None else starts_B.unsqueeze(1))
    return _decode(call, None if ends_B is None else ends_B.contiguous()).squeeze(1)


def decode_folded(q_XKC: Tensor, k_XSC: Tensor, v_XSC: Tensor) -> Tensor:
    """o_XKC for X (batch, head) pairs, each a batch row of one head."""
    q_X1K1C = q_XKC.unsqueeze(2).unsqueeze(1)
    return _decode(_Call.of(q_X1K1C, k_XSC.unsqueeze(2), v_XSC.unsqueeze(2), None), None).view_as(q_XKC)


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


def _decode(call: _Call, ends_B: Tensor | None) -> Tensor:
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
            call.q, call.k, call.v, call.starts, ends_B, parts, lefts, *call.key_strides, *call.value_strides,
            num_keys, heads, num_splits, call.scale * LOG2_E, **constants, TILES=TILES_PER_SPLIT,
        )  # fmt: skip
        join_kernel[(call.pairs,)](parts, lefts, out, heads, num_splits, **joined)
    return out
