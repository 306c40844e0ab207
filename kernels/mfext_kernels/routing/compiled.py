"""Routing's bookkeeping in compiled code: routing.c. Not used where there is no compiler (native.py)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from mfext_kernels.native import Source, in_parts

SOURCE = Source(Path(__file__).with_name("routing.c"))
available, explain = SOURCE.available, SOURCE.explain
MOST_CHOSEN = 32  # as in routing.c
WORTH_A_THREAD = 1 << 16  # scores


def chooses(scores_NE: Tensor, num_chosen: int) -> bool:
    """Whether the greatest of such scores are found this way."""
    plain = scores_NE.dtype == torch.float32 and scores_NE.device.type == "cpu" and scores_NE.dim() == 2
    return plain and 0 < num_chosen <= min(MOST_CHOSEN, scores_NE.shape[1]) and available()


def top_k(scores_NE: Tensor, num_chosen: int) -> Tensor:
    """Places of each row's greatest scores, the greatest first, the earlier of equals first."""
    scores_NE = scores_NE.contiguous()
    num_tokens, num_experts = scores_NE.shape
    chosen_NK = torch.empty(num_tokens, num_chosen, dtype=torch.int64)
    call = SOURCE.function("mfext_top_k", (ctypes.c_void_p,) * 2 + (ctypes.c_int64,) * 4)
    pointers = chosen_NK.data_ptr(), scores_NE.data_ptr()
    in_parts(
        num_tokens,
        lambda first, last: call(*pointers, num_experts, num_chosen, first, last),
        scores_NE.numel() // WORTH_A_THREAD,
    )
    return chosen_NK


def sort_rows(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """order_R, inverse_R, tokens_R and bounds_E1 of a Dispatch; None where an expert is outside the range."""
    experts_NK = experts_NK.contiguous()
    order_R, inverse_R, tokens_R = torch.empty(3, experts_NK.numel(), dtype=torch.int64).unbind(0)
    bounds_E1 = torch.empty(num_experts + 1, dtype=torch.int32)
    call = SOURCE.function("mfext_dispatch", (ctypes.c_void_p,) * 5 + (ctypes.c_int64,) * 3, ctypes.c_int64)
    pointers = [each.data_ptr() for each in (order_R, inverse_R, tokens_R, bounds_E1, experts_NK)]
    return None if call(*pointers, *experts_NK.shape, num_experts) else (order_R, inverse_R, tokens_R, bounds_E1)
