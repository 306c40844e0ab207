"""Head and cross-entropy without the logits: chunks of tokens, gradients computed on the way forward.

A chunk's logits become their own gradient in place, softmax minus one-hot, which gives the chunk's part of both
gradients. The mean's 1 / count comes last: before it would push 16-bit gradients of many tokens below what they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mfext_kernels.autograd import applied

ELEMENTS = 1 << 20  # of one chunk's logits: 4 MiB in fp32
FEWEST_TOKENS = 64  # a chunk reads the whole weight


@dataclass(frozen=True)
class Chunking:
    """How many logits are held at once, and `step`: (logits_MV, targets_M, gradient) -> each token's loss.

    An ignored token's is 0. Where `gradient` is asked, the summed losses' gradient is left in place of the logits.
    """

    elements: int
    fewest_tokens: int
    step: Callable[[Tensor, Tensor, bool], Tensor]


def fused_linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean over the targets that are not -100."""
    return in_chunks(x_ND, weight_VD, targets_N, Chunking(ELEMENTS, FEWEST_TOKENS, _step))


def in_chunks(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunking: Chunking) -> Tensor:
    """The op with the chunks, and the step within one, that `chunking` says."""
    if not torch.is_grad_enabled():
        x_ND, weight_VD = x_ND.detach(), weight_VD.detach()
    return applied(_FusedLinearCrossEntropy, x_ND, weight_VD, targets_N, chunking)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunking: Chunking) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        grad_x = torch.empty_like(x_ND, memory_format=torch.contiguous_format) if need_x else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=exact, device=x_ND.device) if need_weight else None
        losses = torch.zeros(x_ND.shape[0], dtype=exact, device=x_ND.device)
        size = max(chunking.fewest_tokens, chunking.elements // weight_VD.shape[0])
        with torch.autocast(x_ND.device.type, enabled=False):
            for first in range(0, x_ND.shape[0], size):
                part = slice(first, first + size)
                logits_MV = torch.mm(x_ND[part], weight_VD.t())
                losses[part] = chunking.step(logits_MV, targets_N[part], need_x or need_weight)
                if grad_x is not None:
                    torch.mm(logits_MV, weight_VD, out=grad_x[part])
                if grad_weight is not None and grad_weight.dtype == x_ND.dtype:
                    grad_weight.addmm_(logits_MV.t(), x_ND[part])
                elif grad_weight is not None:
                    grad_weight.add_(torch.mm(logits_MV.t(), x_ND[part]))
        count = (targets_N != -100).sum()
        ctx.save_for_backward(grad_x, grad_weight, count)
        ctx.dtype = weight_VD.dtype
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad / count.clamp(min=1)
        grad_x = None if grad_x is None else (grad_x * scale).to(grad_x.dtype)
        grad_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.dtype)
        return grad_x, grad_weight, None, None


def _step(logits_MV: Tensor, targets_M: Tensor, gradient: bool) -> Tensor:
    counts_M1 = (targets_M != -100).unsqueeze(1)
    targets_M1 = targets_M.clamp(min=0).unsqueeze(1)
    exact = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    total_M1 = exact.logsumexp(1, keepdim=True)
    losses_M1 = (total_M1 - exact.gather(1, targets_M1)).masked_fill_(~counts_M1, 0.0)
    if gradient:
        change = exact.sub_(total_M1).exp_()
        change.scatter_add_(1, targets_M1, change.new_full((), -1.0).expand_as(targets_M1))
        logits_MV.copy_(change.masked_fill_(~counts_M1, 0.0))
    return losses_M1.squeeze(1)
