"""Language-model head and cross-entropy in one: contract and choice of implementation.

    loss = mean over n with targets[n] != -100 of  log sum_v exp(x[n] . weight[v]) - x[n] . weight[targets[n]]

Shapes: N tokens, D width, V vocabulary. The logits (N, V) are never held at once: tokens go through in chunks, and the
gradient of a chunk's logits is used up before the next, so forward computes both gradients where they will be wanted.
fp32, float64; bf16 and fp16 are summed in fp32. Under autocast everything is cast to the autocast dtype.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mfext_kernels.backends import Backend, choose
from mfext_kernels.fused_linear_cross_entropy import cpu, reference

IGNORED = -100


def fused_linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, backend: Backend | None = None
) -> Tensor:
    """Mean cross-entropy in nats per token whose target is not -100, a scalar in at least fp32; NaN if there is none.

    A target outside the vocabulary raises ValueError on the CPU; on CUDA, where a look would wait for the card, it
    makes the loss NaN. The gradient is a constant to autograd: it cannot be differentiated again.
    """
    if x_ND.dim() != 2 or weight_VD.dim() != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"x_ND, weight_VD: must be (N, D) and (V, D), not {tuple(x_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if targets_N.shape != x_ND.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets_N: must be int64 of shape ({x_ND.shape[0]},), not {targets_N.dtype} of {tuple(targets_N.shape)}"
        )
    if targets_N.device.type == "cpu":
        _check_range(targets_N, weight_VD.shape[0])
    kind = x_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_ND.dtype
    loss: Tensor = _implementation(backend, x_ND.to(dtype)).fused_linear_cross_entropy(
        x_ND.to(dtype), weight_VD.to(dtype), targets_N
    )
    return loss


def _implementation(backend: Backend | None, x_ND: Tensor) -> ModuleType:
    chosen = choose(backend, x_ND)
    if chosen == "triton":
        from mfext_kernels.fused_linear_cross_entropy import triton

        return triton
    return reference if chosen == "reference" else cpu


def _check_range(targets_N: Tensor, vocabulary: int) -> None:
    outside = targets_N[((targets_N < 0) | (targets_N >= vocabulary)) & (targets_N != IGNORED)]
    if outside.numel():
        raise ValueError(f"targets_N: must be from 0 to {vocabulary - 1}, or {IGNORED}, not {int(outside[0])}")
