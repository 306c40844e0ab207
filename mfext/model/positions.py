"""Where every token stands: its absolute position and where its document began."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """Positions of T new tokens that follow `offset` cached ones.

    `starts_BT` are absolute indices of the first token a position may see (its document's
    first token, or the first token after left padding); None means 0 everywhere. A position
    whose start lies behind it is padding and sees nothing. `ends_B`, for one new position a row only: one past the
    last key, where the keys are all of a cache's room.
    """

    offset: int
    starts_BT: Tensor | None
    ends_B: Tensor | None = None

    @classmethod
    def of(
        cls,
        input_ids_BT: Tensor,
        offset: int,
        attention_mask_BT: Tensor | None,
        document_starts_BT: Tensor | None,
        cached_starts_B: Tensor | None,
    ) -> Positions:
        """Combine packing (`document_starts`), padding (`attention_mask`) and what a cache remembers."""
        starts_BT = document_starts_BT
        if starts_BT is None and cached_starts_B is not None and offset > 0:
            starts_BT = cached_starts_B[:, None].expand_as(input_ids_BT)
        if attention_mask_BT is not None:
            real_BT = attention_mask_BT.to(torch.bool)
            none_B = ~real_BT.any(1)
            first_B = real_BT.to(torch.int8).argmax(1) + none_B * input_ids_BT.shape[1] + offset
            if bool((first_B > offset).any()):
                first_B1 = torch.where(first_B > offset, first_B, 0)[:, None]
                starts_BT = (
                    first_B1.expand_as(input_ids_BT) if starts_BT is None else torch.maximum(starts_BT, first_B1)
                )
        return cls(offset, starts_BT)

    def dense_starts(self, input_ids_BT: Tensor) -> Tensor:
        """`starts_BT` with None filled in as zeros."""
        return torch.zeros_like(input_ids_BT) if self.starts_BT is None else self.starts_BT
