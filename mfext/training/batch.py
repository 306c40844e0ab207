"""A training batch, read from our own form or from the form other people's loaders give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mfext.errors import InputError
from mfext.model.losses import IGNORED


@dataclass(frozen=True)
class Batch:
    """input_ids, targets (shifted, -100 not scored), document_starts and attention_mask, all (B, T).

    `progress` is the share of the stage's optimizer steps done before this one; 1 outside of a stage.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    document_starts_BT: Tensor | None = None
    attention_mask_BT: Tensor | None = None
    progress: float = 1.0

    @property
    def valid_N(self) -> Tensor | None:
        """True where a token is not padding; None where no token is."""
        return None if self.attention_mask_BT is None else self.attention_mask_BT.flatten().bool()


def read_batch(batch: Mapping[str, Tensor]) -> Batch:
    """Read `input_ids` with `targets` (already shifted) or `labels` (unshifted, shifted here).

    `labels` follow the common convention: labels[t] is the token at t, -100 where not scored.
    Padding (attention_mask 0) is never scored. Raises InputError naming the missing key.
    """
    if "input_ids" not in batch or not ("targets" in batch or "labels" in batch):
        raise InputError(
            f"a training batch has the keys {', '.join(sorted(batch))}",
            "",
            "it needs input_ids and either targets (shifted) or labels (unshifted)",
        )
    mask_BT = batch.get("attention_mask")
    if "targets" in batch:
        targets_BT = batch["targets"]
    else:
        labels_BT = batch["labels"]
        if mask_BT is not None:
            labels_BT = labels_BT.masked_fill(mask_BT == 0, IGNORED)
        last_B1 = torch.full_like(labels_BT[:, :1], IGNORED)
        targets_BT = torch.cat([labels_BT[:, 1:], last_B1], dim=1)
    return Batch(batch["input_ids"], targets_BT, batch.get("document_starts"), mask_BT)
