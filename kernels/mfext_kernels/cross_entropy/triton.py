# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Cross-entropy on a GPU: logits are read once forward and once backward, in their own dtype.

One program per token goes over its logits `columns` at a time: forward a running maximum and sum of exponentials
(rescaled where the maximum grows), whose logarithm is kept; backward softmax minus one-hot, times the loss's gradient
over the number of tokens that count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.autograd import applied
from mfext_kernels.backends import on_device_of
from mfext_kernels.tuning import config_for

IGNORED = -100


@triton.jit
def loss_kernel(logits, targets, losses, totals, row_stride, num_columns, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token)
    row = logits + token * row_stride
    most = -3.0e38
    summed = 0.0
    for first in range(0, num_columns, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        values = tl.load(row + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        more = tl.maximum(most, tl.max(values, 0))
        summed = summed * tl.exp(most - more) + tl.sum(tl.exp(values - more), 0)
        most = more
    total = most + tl.log(summed)
    inside = (target >= 0) & (target < num_columns)
    own = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(totals + token, total)
    tl.store(losses + token, tl.where(target != -100, total - own, 0.0))


@triton.jit
def grad_logits_kernel(
    logits, targets, totals, share, grad, row_stride, grad_stride, num_columns, COLUMNS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token)
    total = tl.load(totals + token)
    factor = tl.where(target != -100, tl.load(share), 0.0)
    for first in range(0, num_columns, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        values = tl.load(logits + token * row_stride + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        change = (tl.exp(values - total) - tl.where(columns == target, 1.0, 0.0)) * factor
        change = tl.where(target != -100, change, 0.0)
        at = grad + token * grad_stride + columns
        tl.store(at, change.to(grad.dtype.element_ty), mask=columns < num_columns)


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Mean over the targets that are not -100."""
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    return applied(_CrossEntropy, logits_NV, targets_N.contiguous())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        config = config_for("cross_entropy", logits_NV)
        losses_N, totals_N = (torch.empty(len(targets_N), device=logits_NV.device) for _ in range(2))
        with on_device_of(logits_NV):
            if targets_N.numel():
                loss_kernel[(len(targets_N),)](
                    logits_NV, targets_N, losses_N, totals_N, logits_NV.stride(0), logits_NV.shape[1],
                    COLUMNS=config.columns, num_warps=config.warps,
                )  # fmt: skip
        count = (targets_N != IGNORED).sum()
        ctx.save_for_backward(logits_NV, targets_N, totals_N, count)
        return losses_N.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, totals_N, count = ctx.saved_tensors
        config = config_for("cross_entropy", logits_NV)
        grad_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
        share = (grad / count).float()
        with on_device_of(logits_NV):
            if targets_N.numel():
                grad_logits_kernel[(len(targets_N),)](
                    logits_NV, targets_N, totals_N, share, grad_NV, logits_NV.stride(0), grad_NV.stride(0),
                    logits_NV.shape[1], COLUMNS=config.columns, num_warps=config.warps,
                )  # fmt: skip
        return grad_NV, None
