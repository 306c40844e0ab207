"""What a domain gate reads while it learns: new text, probes and text of no domain, alone and one after another.

A gate that learns from documents of one domain each may rely on how a document began, and then takes hundreds of
tokens to notice that it went on in another. So a share of the batches are documents that change domain. And samples
of a small model are told from text by their misspellings, which says nothing of the domain: so tokens are replaced
at random, on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfext.config import GateTraining, ModelConfig
from mfext.growth.probes import Windows, document_starts, open_set_negatives

REGIONS = 3  # of a document that changes domain


@dataclass(frozen=True)
class GateBatch:
    """Token ids and document starts (B, T), and where the gate is to open: 1 on new text, else 0."""

    input_ids: Tensor
    document_starts: Tensor
    labels_BT: Tensor


@dataclass(frozen=True)
class GateText:
    """What the batches of one gate are drawn from: windows of the new domain, probes of all that was before."""

    new: Windows
    old: Windows
    vocab_size: int
    bos_id: int
    special_ids: frozenset[int]

    @classmethod
    def of(cls, config: ModelConfig, new: Windows, old: Windows) -> GateText:
        """For a model of this config."""
        special = frozenset((config.bos_id, config.eos_id, config.pad_id))
        return cls(new, old, config.vocab_size, config.bos_id, special)

    def batch(self, settings: GateTraining, generator: torch.Generator) -> GateBatch:
        """A batch of documents of one domain or, `switching_share` of the times, of documents that change domain."""
        switching = float(torch.rand(1, generator=generator)) < settings.switching_share
        rows = self._switching(settings, generator) if switching else self._whole(settings, generator)
        return GateBatch(self._noisy(rows.input_ids, settings, generator), rows.document_starts, rows.labels_BT)

    def negatives(self, windows: Windows, generator: torch.Generator) -> Windows:
        """Text of no domain made from `windows`."""
        return open_set_negatives(windows, self.vocab_size, set(self.special_ids), generator)

    def _whole(self, settings: GateTraining, generator: torch.Generator) -> GateBatch:
        """Windows of one kind each, half the times cut so that they begin anywhere."""
        num_new, num_old, num_negative = _parts(settings)
        some_new, some_old = draw(self.new, num_new + num_negative, generator), draw(self.old, num_old, generator)
        negatives = self.negatives(some_new.take(torch.arange(num_new, len(some_new))), generator)
        length = min(some_new.input_ids.shape[1], some_old.input_ids.shape[1])
        anywhere = int(torch.randint(0, 2, (1,), generator=generator))
        begin = anywhere * int(torch.randint(0, length // 2, (1,), generator=generator))
        kinds = (some_new.take(torch.arange(num_new)), some_old, negatives)
        parts = [each.cut(begin, length - begin) for each in kinds]
        labels_BT = torch.zeros(settings.batch_size, length - begin)
        labels_BT[:num_new] = 1.0
        ids, starts = (torch.cat([getattr(each, name) for each in parts]) for name in ("input_ids", "document_starts"))
        return GateBatch(ids, starts, labels_BT)

    def _switching(self, settings: GateTraining, generator: torch.Generator) -> GateBatch:
        """Documents of REGIONS pieces of windows, each of a kind drawn anew; regions begin at the same positions."""
        count, shares = settings.batch_size, torch.tensor(_parts(settings), dtype=torch.float32)
        kinds = torch.multinomial(shares, count * REGIONS, replacement=True, generator=generator).view(count, REGIONS)
        width = min(self.new.input_ids.shape[1], self.old.input_ids.shape[1])
        lengths = torch.randint(max(1, width // 5), width, (REGIONS,), generator=generator).tolist()
        regions = []
        for region, length in enumerate(lengths):
            windows = self._of_kinds(kinds[:, region], generator)
            # A sampled window begins with bos; no later region may, or bos would announce it.
            first = int(torch.randint(1, width - length + 1, (1,), generator=generator)) if region else 0
            regions.append(windows[:, first : first + length])
        ids = torch.cat(regions, dim=1)
        labels = (kinds == 0).float().repeat_interleave(torch.tensor(lengths), dim=1)
        return GateBatch(ids, document_starts(ids, self.bos_id), labels)

    def _of_kinds(self, kinds_B: Tensor, generator: torch.Generator) -> Tensor:
        """A window (B, T) of each row's kind: 0 new, 1 old, 2 of no domain."""
        count, width = len(kinds_B), min(self.new.input_ids.shape[1], self.old.input_ids.shape[1])
        new, old = draw(self.new, count, generator), draw(self.old, count, generator)
        nowhere = self.negatives(draw(self.new, count, generator), generator)
        by_kind = torch.stack([each.input_ids[:, :width] for each in (new, old, nowhere)])
        return by_kind[kinds_B, torch.arange(count)]

    def _noisy(self, ids_BT: Tensor, settings: GateTraining, generator: torch.Generator) -> Tensor:
        """Up to `noise` of a row's tokens replaced by others of the batch; special tokens stay, and none is made."""
        if not settings.noise:
            return ids_BT
        share_B1 = settings.noise * torch.rand(len(ids_BT), 1, generator=generator)
        other_BT = ids_BT.flatten()[torch.randint(ids_BT.numel(), ids_BT.shape, generator=generator)]
        special = torch.tensor(sorted(self.special_ids))
        kept = (torch.rand(ids_BT.shape, generator=generator) >= share_B1) | torch.isin(ids_BT, special)
        return torch.where(kept | torch.isin(other_BT, special), ids_BT, other_BT)


def draw(windows: Windows, count: int, generator: torch.Generator) -> Windows:
    """`count` windows with replacement."""
    return windows.take(torch.randint(len(windows), (count,), generator=generator))


def _parts(settings: GateTraining) -> Sequence[int]:
    """How many rows of a batch are new text, probes, and text of no domain."""
    num_negative = int(settings.batch_size * settings.negatives_share)
    num_new = (settings.batch_size - num_negative) // 2
    return num_new, settings.batch_size - num_new - num_negative, num_negative
