"""Dense matrix products of float32 on the CPU by oneDNN, where MKL is slow: with AVX-512 on processors not Intel's.

torch multiplies by MKL, which takes its AVX-512 code on Intel processors alone; oneDNN, in torch too, takes it on all.
AMD's before Zen 5 multiply no faster with it than with AVX2, so MKL, which costs less a call, stays there. The choice
hangs on the processor and the sizes, never on a timing: the same program gives the same bits again.

oneDNN compiles code for every new number of rows, which takes as long as the product itself. So rows go in calls of a
multiple of 16, the last one with rows that lie before its own: a row's bits do not depend on how many rows there are.
Nothing here is differentiated, but for `linear`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.autograd import applied

STEP, BLOCK = 16, 64  # rows of a call are a multiple of one, of long calls of the other
AT_ONCE = 512  # rows multiplied before they are copied to where they belong: still in cache, and no large buffer
FEWEST_ROWS = 64
ALIGNED, MANY_OUTPUTS = 64, 1024  # on a GPU
ZEN_5 = 26  # AMD's family number; 25 takes two steps for a vector of AVX-512
SMALLEST = 1 << 14  # multiplications a row; a call of oneDNN costs 7 us more than one of MKL


@dataclass(frozen=True)
class Choice:
    """Whether large products go to oneDNN here, and why."""

    onednn: bool
    reason: str


@cache
def choice() -> Choice:
    """Asked once a process."""
    if os.environ.get("MFEXT_ONEDNN") == "0":
        return Choice(False, "torch's own, oneDNN switched off by MFEXT_ONEDNN=0")
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return Choice(False, "torch's own, which is not MKL")
    (vendor, family), capability = _processor(), torch.backends.cpu.get_cpu_capability()
    if vendor in (None, "GenuineIntel") or capability != "AVX512":
        return Choice(False, f"MKL ({vendor or 'unknown processor'}, {capability})")
    if vendor == "AuthenticAMD" and family < ZEN_5:
        return Choice(False, f"MKL ({vendor}, family {family}, multiplies no faster with AVX-512)")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return Choice(False, f"MKL, slow on {vendor}: this torch has no oneDNN to call")
    return Choice(True, f"oneDNN (MKL is slow on {vendor})")


def explain() -> str:
    """What multiplies large matrices here, and why."""
    return choice().reason


def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """left @ right."""
    if not _applies(left_MK, right_KN, left_MK.shape[0], right_KN.numel()):
        return torch.mm(left_MK, right_KN)
    return _in_parts(left_MK, right_KN.t(), None)


def product_over_rows(left_RM: Tensor, right_RN: Tensor) -> Tensor:
    """left^T @ right, a matrix's gradient from R rows."""
    rows = left_RM.shape[0]
    if not _applies(left_RM, right_RN, rows, left_RM.shape[1] * right_RN.shape[1]):
        return torch.mm(left_RM.t(), right_RN)
    whole = rows - rows % (STEP if rows < AT_ONCE else BLOCK)
    sum_MN = _onednn(left_RM[:whole].t(), right_RN[:whole].t(), None)
    if whole < rows:
        return torch.addmm(sum_MN, left_RM[whole:].t(), right_RN[whole:], out=sum_MN)
    return sum_MN


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias over the last dimension of x, with gradients: F.linear where oneDNN does not pay."""
    if x.is_cuda and weight_OI.shape[0] > MANY_OUTPUTS and weight_OI.shape[0] % ALIGNED:
        return aligned_linear(x, weight_OI, bias_O)
    rows = x.numel() // max(1, x.shape[-1])
    if not _suits(x, weight_OI, rows, weight_OI.numel()) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_OI, bias_O)
    x_NI = x.reshape(rows, x.shape[-1])
    return applied(_Linear, x_NI, weight_OI, bias_O).view(*x.shape[:-1], weight_OI.shape[0])


def aligned_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """F.linear of as many outputs as cuBLAS multiplies well, the added ones cut off again.

    With an odd vocabulary (MoLM's 50 295) it reads 16-bit numbers one by one: the head and its gradients then took
    41 ms of a training step's 85 (four layers, 16 384 tokens, one H200, 2026-11).
    """
    missing = -weight_OI.shape[0] % ALIGNED
    bias_P = None if bias_O is None else F.pad(bias_O, (0, missing))
    return F.linear(x, F.pad(weight_OI, (0, 0, 0, missing)), bias_P)[..., : weight_OI.shape[0]]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_NI if need_weight else None, weight_OI if need_x else None)
        return _in_parts(x_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI = ctx.saved_tensors
        grad_x = None if weight_OI is None else product(grad_NO, weight_OI)
        grad_weight = None if x_NI is None else product_over_rows(grad_NO, x_NI)
        return grad_x, grad_weight, grad_NO.sum(0) if ctx.needs_input_grad[2] else None


def _applies(left: Tensor, right: Tensor, rows: int, each: int) -> bool:
    """Whether oneDNN takes this product; what autograd or autocast must see is left to torch."""
    seen = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    return _suits(left, right, rows, each) and not seen and not torch.is_autocast_enabled("cpu")


def _suits(left: Tensor, right: Tensor, rows: int, each: int) -> bool:
    """Whether oneDNN is faster for so many rows with `each` multiplications a row.

    Not asked of their product: from FEWEST_ROWS on, all of a matrix's rows go one way, whatever their number.
    """
    large = rows >= FEWEST_ROWS and each >= SMALLEST
    fp32 = left.dtype == right.dtype == torch.float32 and left.device.type == right.device.type == "cpu"
    return large and fp32 and choice().onednn


def _in_parts(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    rows = left_MK.shape[0]
    if not rows % (STEP if rows <= AT_ONCE else BLOCK):
        return _onednn(left_MK, right_NK, bias_N)
    written = left_MK.new_empty(rows, right_NK.shape[0])
    for start, first, last in _calls(rows):
        written[first:last].copy_(_onednn(left_MK[start:last], right_NK, bias_N)[first - start :])
    return written


def _calls(rows: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, last): a call multiplies rows [start, last), a multiple of STEP, for the sake of [first, last)."""
    for first in range(0, rows, AT_ONCE):
        last = min(first + AT_ONCE, rows)
        missing = -(last - first) % STEP
        if missing <= first:
            yield first - missing, first, last
        else:
            whole = last - (last - first) % STEP
            yield first, first, whole
            yield last - STEP, whole, last


def _onednn(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(_rows(left_MK), _rows(right_NK), bias_N, "none", [], "")
    return found


def _rows(matrix: Tensor) -> Tensor:
    """The matrix as oneDNN reads it: one of its two strides is 1, and no element is shown twice."""
    (rows, columns), (across, along) = matrix.shape, matrix.stride()
    plain = (along == 1 and across >= columns) or (across == 1 and along >= rows)
    return matrix if plain else matrix.contiguous()


def _processor() -> tuple[str | None, int]:
    """Its vendor and family, as Linux tells them."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.is_file() else ""
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
    return vendor and vendor.group(1), int(family.group(1)) if family else 0
