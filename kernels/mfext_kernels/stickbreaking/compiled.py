"""Stick-breaking attention in compiled code, products included: attention.c, computed in float32 on the CPU.

Not used where there is no compiler (native.py), for numbers wider than float32, or for more chosen experts than a block
of attention.c holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.autograd import applied
from mfext_kernels.native import CONTRACTED, Source, in_parts

SOURCE = Source(Path(__file__).with_name("attention.c"), (CONTRACTED,))
available, explain = SOURCE.available, SOURCE.explain
MOST_CHOSEN = 8
ARGUMENTS = {"mfext_attend": (7, 2), "mfext_differentiate": (10, 2)}  # pointers, numbers


class _Shape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int32) for name in ("batch", "queries", "keys", "chosen", "heads", "width"))


def applies(q_BTKHC: Tensor) -> bool:
    """Whether such queries go this way."""
    chosen, heads, width = q_BTKHC.shape[2:]
    narrow = q_BTKHC.dtype in (torch.float32, torch.bfloat16, torch.float16) and q_BTKHC.device.type == "cpu"
    return narrow and 0 < chosen <= MOST_CHOSEN and heads * width > 0 and SOURCE.available()


def stickbreaking_attention(q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
    """o_i = sum_j a_ij v_j; backward keeps two numbers a (query, chosen expert) and key for 64 queries at a time."""
    return applied(_Attention, q_BTKHC, k_BSHC, v_BSHC, starts_BT)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, starts_BT: Tensor | None) -> Tensor:
        given = [each.float().contiguous() for each in (q_BTKHC, k_BSHC, v_BSHC)]
        starts_BT = None if starts_BT is None else starts_BT.long().contiguous()
        o_BTKHC = torch.empty_like(given[0])
        _call("mfext_attend", _shape(given), (o_BTKHC, *given, starts_BT), backward=False)
        ctx.save_for_backward(*given, starts_BT)
        ctx.dtype = q_BTKHC.dtype
        return o_BTKHC.to(q_BTKHC.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTKHC: Tensor) -> tuple[Tensor | None, ...]:
        *given, starts_BT = ctx.saved_tensors
        grads = [torch.empty_like(given[0]), torch.zeros_like(given[1]), torch.zeros_like(given[2])]
        grad = grad_BTKHC.float().contiguous()
        _call("mfext_differentiate", _shape(given), (*grads, grad, *given, starts_BT), backward=True)
        return (*(each.to(ctx.dtype) for each in grads), None)


def _shape(given: list[Tensor]) -> _Shape:
    batch, queries, chosen, heads, width = given[0].shape
    return _Shape(batch, queries, given[1].shape[1], chosen, heads, width)


def _call(name: str, shape: _Shape, tensors: tuple[Tensor | None, ...], backward: bool) -> None:
    """Pairs (batch, head) shared out among torch's threads, a room for each."""
    function, of = _function(name), ctypes.byref(shape)
    pointers = [0 if each is None else each.data_ptr() for each in tensors]
    needed = SOURCE.function("mfext_attention_room", (ctypes.c_void_p, ctypes.c_int32), ctypes.c_int64)(of, backward)

    def run(first: int, last: int) -> None:
        room = _room(needed)
        function(*pointers, of, room.data_ptr(), first, last)

    in_parts(shape.batch * shape.heads, run)


def _room(numbers: int) -> Tensor:
    return torch.empty(numbers, dtype=torch.float32)


def _function(name: str) -> Callable[..., int]:
    pointers, numbers = ARGUMENTS[name]
    arguments = (ctypes.c_void_p,) * pointers + (ctypes.c_int32,) * numbers
    return SOURCE.operations(name, arguments)
