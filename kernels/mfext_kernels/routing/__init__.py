"""Sort routed rows by expert: the bookkeeping every expert op shares.

Shapes: N tokens, K chosen experts per token, R = N*K routed rows, E experts. Flat row n*K+k is
token n's k-th choice. There is one implementation: it is integer bookkeeping with no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW_ROWS = 32


@dataclass(frozen=True)
class Dispatch:
    """Where each routed row goes. Row r of the sorted list is flat row `order_R[r]`.

    `inverse_R[order_R[r]] == r`; `tokens_R == order_R // K`; `sizes[e]` rows belong to expert e,
    and the rows of one expert keep the order of their tokens.
    """

    order_R: Tensor
    inverse_R: Tensor
    sizes: tuple[int, ...]
    tokens_R: Tensor
    num_tokens: int
    num_chosen: int
    num_experts: int


def make_dispatch(experts_NK: Tensor, num_experts: int) -> Dispatch:
    """Sort the chosen experts (N, K), int64 in [0, num_experts), stably by expert.

    Raises ValueError for another shape or dtype, or an expert outside the range.
    """
    if experts_NK.dim() != 2 or experts_NK.dtype != torch.int64:
        raise ValueError(
            f"experts_NK: must be int64 of shape (N, K), not {experts_NK.dtype} of shape {tuple(experts_NK.shape)}"
        )
    num_tokens, num_chosen = experts_NK.shape
    if experts_NK.numel() <= FEW_ROWS and experts_NK.device.type == "cpu":
        return _dispatch_few(experts_NK.reshape(-1).tolist(), (num_tokens, num_chosen), num_experts)
    with torch.no_grad():
        chosen_R, order_R = torch.sort(experts_NK.reshape(-1), stable=True)
        sizes = _sizes(chosen_R, num_experts)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        tokens_R = torch.div(order_R, num_chosen, rounding_mode="floor") if num_chosen > 1 else order_R
    return Dispatch(order_R, inverse_R, sizes, tokens_R, num_tokens, num_chosen, num_experts)


def _dispatch_few(chosen: list[int], shape: tuple[int, int], num_experts: int) -> Dispatch:
    """The same for a handful of rows (decoding), where one tensor operation costs more than all of Python's."""
    if chosen and (min(chosen) < 0 or max(chosen) >= num_experts):
        raise ValueError(_out_of_range(num_experts, min(chosen), max(chosen)))
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    inverse, sizes = [0] * len(order), [0] * num_experts
    for row, flat in enumerate(order):
        inverse[flat] = row
        sizes[chosen[flat]] += 1
    table = torch.tensor([order, inverse, [flat // shape[1] for flat in order]], dtype=torch.int64)
    order_R, inverse_R, tokens_R = table.unbind(0)
    return Dispatch(order_R, inverse_R, tuple(sizes), tokens_R, *shape, num_experts)


def _sizes(sorted_R: Tensor, num_experts: int) -> tuple[int, ...]:
    if sorted_R.numel() and (int(sorted_R[0]) < 0 or int(sorted_R[-1]) >= num_experts):
        raise ValueError(_out_of_range(num_experts, int(sorted_R[0]), int(sorted_R[-1])))
    return tuple(torch.bincount(sorted_R, minlength=num_experts).tolist())


def _out_of_range(num_experts: int, least: int, greatest: int) -> str:
    return f"experts_NK: must be from 0 to {num_experts - 1}, not {least} to {greatest}"
