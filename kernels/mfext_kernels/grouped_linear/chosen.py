"""Between a token's K chosen experts and the rows sorted by expert: by gathers alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mfext_kernels.routing import Dispatch


def sorted_gates(gates_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """(R)."""
    return gates_NK.reshape(-1).index_select(0, dispatch.order_R)


def by_token(of_rows_R: Tensor, dispatch: Dispatch) -> Tensor:
    """(R) -> (N, K)."""
    return of_rows_R.index_select(0, dispatch.inverse_R).view(dispatch.num_tokens, dispatch.num_chosen)


def sum_chosen(rows: Tensor, gates_NK: Tensor | None, dispatch: Dispatch) -> Tensor:
    """Sorted rows -> per token the sum over its K rows, times gates where given. bf16 sums in fp32."""
    index_NK = dispatch.inverse_R.view(dispatch.num_tokens, dispatch.num_chosen)
    if rows.dtype in (torch.float32, torch.float64) and rows.device.type == "cpu" and rows.shape[0]:
        summed: Tensor = F.embedding_bag(index_NK, rows, per_sample_weights=gates_NK, mode="sum")
        return summed
    picked = rows.index_select(0, dispatch.inverse_R).view(*index_NK.shape, rows.shape[1])
    if gates_NK is not None:
        picked = picked.float() * gates_NK.float().unsqueeze(-1)
    return picked.sum(1, dtype=torch.float32 if rows.dtype == torch.bfloat16 else None).to(rows.dtype)
