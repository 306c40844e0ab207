"""Sort routed rows by expert: the bookkeeping every expert op shares.

Shapes: N tokens, K chosen experts per token, R = N*K routed rows, E experts. Flat row n*K+k is
token n's k-th choice. There is one implementation: it is integer bookkeeping with no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfext_kernels.routing import compiled

SHORT = 1 << 15  # expert numbers that fit 16 bits sort in a quarter of the passes over the rows on a GPU


@dataclass(frozen=True)
class Dispatch:
    """Where each routed row goes. Row r of the sorted list is flat row `order_R[r]`.

    `inverse_R[order_R[r]] == r`; `tokens_R == order_R // K`; the rows from `bounds_E1[e]` to `bounds_E1[e + 1]` (int32)
    belong to expert e and keep the order of their tokens. `tables`: what an implementation works out from these once.
    """

    order_R: Tensor
    inverse_R: Tensor
    tokens_R: Tensor
    bounds_E1: Tensor
    num_tokens: int
    num_chosen: int
    tables: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_experts(self) -> int:
        return self.bounds_E1.numel() - 1

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of every expert's rows, as integers: the first look waits for the device."""
        return tuple(self.bounds_E1.diff().tolist())


def make_dispatch(experts_NK: Tensor, num_experts: int) -> Dispatch:
    """Sort the chosen experts (N, K), int64 in [0, num_experts), stably by expert; on a GPU without waiting for it.

    Raises ValueError for another shape or dtype, or on the CPU an expert outside the range; on a GPU, where a look
    would wait for the card, such a choice's result is undefined.
    """
    if experts_NK.dim() != 2 or experts_NK.dtype != torch.int64:
        raise ValueError(
            f"experts_NK: must be int64 of shape (N, K), not {experts_NK.dtype} of shape {tuple(experts_NK.shape)}"
        )
    num_tokens, num_chosen = experts_NK.shape
    on_cpu = experts_NK.device.type == "cpu"
    if on_cpu and compiled.available():
        made = compiled.sort_rows(experts_NK, num_experts)
        if made is None:
            raise ValueError(_out_of_range(num_experts, int(experts_NK.min()), int(experts_NK.max())))
        return Dispatch(*made, num_tokens, num_chosen)
    with torch.no_grad():
        flat_R = experts_NK.reshape(-1)
        chosen_R, order_R = torch.sort(flat_R if on_cpu or num_experts > SHORT else flat_R.short(), stable=True)
        if on_cpu and chosen_R.numel() and (int(chosen_R[0]) < 0 or int(chosen_R[-1]) >= num_experts):
            raise ValueError(_out_of_range(num_experts, int(chosen_R[0]), int(chosen_R[-1])))
        experts_E1 = torch.arange(num_experts + 1, dtype=chosen_R.dtype, device=chosen_R.device)
        bounds_E1 = torch.searchsorted(chosen_R, experts_E1, out_int32=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        tokens_R = torch.div(order_R, num_chosen, rounding_mode="floor") if num_chosen > 1 else order_R
    return Dispatch(order_R, inverse_R, tokens_R, bounds_E1, num_tokens, num_chosen)


def top_k(scores_NE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """The `num_chosen` greatest scores of each row (N, E), the greatest first, and their places, both (N, K).

    The scores are differentiated. On a CPU with a compiler the earlier of equal scores come first; elsewhere the order
    is torch.topk's, which promises none. Raises RuntimeError for more than E.
    """
    if not compiled.chooses(scores_NE, num_chosen):
        return torch.topk(scores_NE, num_chosen, dim=-1)
    experts_NK = compiled.top_k(scores_NE, num_chosen)
    return scores_NE.gather(-1, experts_NK), experts_NK


def _out_of_range(num_experts: int, least: int, greatest: int) -> str:
    return f"experts_NK: must be from 0 to {num_experts - 1}, not {least} to {greatest}"
