# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Head and cross-entropy on a GPU: the products are torch's, the softmax, loss and gradient one kernel in place.

One program per token goes over its logits twice, `columns` at a time: a running maximum and sum of exponentials
(rescaled where the maximum grows), then softmax minus one-hot written over what it read. A target outside the
vocabulary gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfext_kernels.backends import on_device_of
from mfext_kernels.fused_linear_cross_entropy.cpu import Chunking, in_chunks
from mfext_kernels.tuning import config_for

ELEMENTS = 1 << 26  # of one chunk's logits: 128 MiB in 16 bits
FEWEST_TOKENS = 256


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, row_stride, num_columns, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr
):
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
    counts = target != -100
    tl.store(losses + token, tl.where(counts, total - own, 0.0))
    if GRADIENT:
        for first in range(0, num_columns, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            values = tl.load(row + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
            change = tl.exp(values - total) - tl.where(columns == target, 1.0, 0.0)
            change = tl.where(counts, change, 0.0)
            tl.store(row + columns, change.to(logits.dtype.element_ty), mask=columns < num_columns)


def fused_linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean over the targets that are not -100."""
    return in_chunks(x_ND, weight_VD, targets_N, Chunking(ELEMENTS, FEWEST_TOKENS, _step))


def _step(logits_MV: Tensor, targets_M: Tensor, gradient: bool) -> Tensor:
    config = config_for("cross_entropy", logits_MV)
    losses_M = torch.empty(logits_MV.shape[0], device=logits_MV.device)
    with on_device_of(logits_MV):
        cross_entropy_kernel[(logits_MV.shape[0],)](
            logits_MV, targets_M.contiguous(), losses_M, logits_MV.stride(0), logits_MV.shape[1],
            GRADIENT=gradient, COLUMNS=config.columns, num_warps=config.warps,
        )  # fmt: skip
    return losses_M
