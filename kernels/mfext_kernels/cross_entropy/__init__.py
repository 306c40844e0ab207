"""Cross-entropy of logits that are wanted for more than the loss: contract and choice of implementation.

    loss = mean over n with targets[n] != -100 of  log sum_v exp(logits[n, v]) - logits[n, targets[n]]

Shapes: N tokens, V vocabulary; rows may lie further apart than V. fp32, float64; bf16 and fp16 are summed in fp32.
Where nobody needs the logits, fused_linear_cross_entropy does not hold them at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfext_kernels.backends import Backend, choose

__all__ = ["cross_entropy"]


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, backend: Backend | None = None) -> Tensor:
    """Mean in nats per token whose target is not -100, a scalar in at least fp32; NaN if there is none.

    A target outside the vocabulary raises IndexError on the CPU and makes the loss NaN on CUDA. "cpu" and "reference"
    are torch's own, which copies 16-bit logits to fp32, and their gradient back.
    """
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"logits_NV, targets_N: must be (N, V) and int64 (N,), not {tuple(logits_NV.shape)} and "
            f"{targets_N.dtype} {tuple(targets_N.shape)}"
        )
    if choose(backend, logits_NV) == "triton":
        from mfext_kernels.cross_entropy import triton

        return triton.cross_entropy(logits_NV, targets_N)
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    return F.cross_entropy(logits_NV.to(exact), targets_N)
