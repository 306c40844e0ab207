"""Text a domain gate must stay closed on: samples of the old domains, and open-set negatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mfext.model.generate import sample_documents
from mfext.model.moduleformer import ModuleFormer


@dataclass(frozen=True)
class Windows:
    """Token windows (M, T) and where each position's document began (M, T)."""

    input_ids: Tensor
    document_starts: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def joined(self, other: Windows) -> Windows:
        """These windows and those of `other`, at the length of the shorter ones."""
        length = min(self.input_ids.shape[1], other.input_ids.shape[1])
        parts = self.cut(0, length), other.cut(0, length)
        ids, starts = (torch.cat([getattr(each, name) for each in parts]) for name in ("input_ids", "document_starts"))
        return Windows(ids, starts)

    def take(self, rows: Tensor) -> Windows:
        return Windows(self.input_ids[rows], self.document_starts[rows])

    def cut(self, begin: int, length: int) -> Windows:
        """Positions begin .. begin + length; documents cut by the edge start at it."""
        ids = self.input_ids[:, begin : begin + length]
        return Windows(ids, (self.document_starts[:, begin : begin + length] - begin).clamp_min(0))


def document_starts(input_ids_BT: Tensor, bos_id: int) -> Tensor:
    """Index of the last bos at or before each position, 0 before the first (B, T)."""
    positions = torch.arange(input_ids_BT.shape[1]).expand_as(input_ids_BT)
    return torch.where(input_ids_BT == bos_id, positions, 0).cummax(1).values


def self_probes(model: ModuleFormer, num: int, length: int, seed: int, generations: int | None = None) -> Windows:
    """Sample `num` windows of `length` tokens from the frozen model itself, so that no old text is needed.

    Half come from the model with every gate held closed (generations without one stay in it), which knows most, and
    an equal part of the rest from each gated generation with its own held open; only from the first `generations` of
    them where that is given.
    """
    config = model.config
    gated = [number for number, each in enumerate(config.generations[:generations], 1) if each.mode == "gated"]
    counts = [num]
    if gated:
        parts = torch.tensor_split(torch.arange(num // 2), len(gated))
        counts = [num - num // 2, *(len(part) for part in parts)]
    samples = []
    for position, (count, opened) in enumerate(zip(counts, [None, *gated], strict=True)):
        with _held_open(model, opened):
            samples.append(sample_documents(model, count, length, seed + position, batch=256))
    ids = torch.cat([sample for sample in samples if len(sample)])
    return Windows(ids, document_starts(ids, config.bos_id))


def own_samples(model: ModuleFormer, num: int, length: int, seed: int) -> Windows:
    """Sample `num` windows of `length` tokens from the newest generation, its gate held open and all others closed."""
    with _held_open(model, len(model.generations)):
        ids = sample_documents(model, num, length, seed, batch=256)
    return Windows(ids, document_starts(ids, model.config.bos_id))


@contextmanager
def _held_open(model: ModuleFormer, number: int | None) -> Iterator[None]:
    """Hold one generation's gate at exactly 1 and the others' at 0; every bit is put back."""
    biases = []
    for each in range(1, len(model.generations) + 1):
        gate = model.generation(each).gate
        if gate is not None:
            biases.append((gate.output.bias, gate.output.bias.detach().clone()))
            with torch.no_grad():
                gate.output.bias.fill_(1e9 if each == number else -1e9)
    try:
        yield
    finally:
        with torch.no_grad():
            for bias, before in biases:
                bias.copy_(before)


def open_set_negatives(windows: Windows, vocab_size: int, special_ids: set[int], generator: torch.Generator) -> Windows:
    """Text of no known domain made from new-domain windows, a quarter each: ids permuted,
    positions shuffled, uniform ids, ids of one narrow band. Special tokens stay where they are.
    """
    ids = windows.input_ids
    ordinary = torch.tensor([each for each in range(vocab_size) if each not in special_ids])
    special = torch.isin(ids, torch.tensor(sorted(special_ids)))
    kind = torch.arange(len(ids)) % 4
    permuted = torch.arange(vocab_size)
    permuted[ordinary] = ordinary[torch.randperm(len(ordinary), generator=generator)]
    shuffled = ids.gather(1, torch.rand(ids.shape, generator=generator).argsort(1))
    shuffled = torch.where(torch.isin(shuffled, torch.tensor(sorted(special_ids))), ids.roll(1, 0), shuffled)
    uniform = ordinary[torch.randint(len(ordinary), ids.shape, generator=generator)]
    width = torch.randint(2, max(3, len(ordinary) // 4), (len(ids), 1), generator=generator)
    low = (torch.rand(len(ids), 1, generator=generator) * (len(ordinary) - width)).long()
    band = ordinary[low + (torch.rand(ids.shape, generator=generator) * width).long()]
    made = torch.stack([permuted[ids], shuffled, uniform, band])[kind, torch.arange(len(ids))]
    return Windows(torch.where(special, ids, made), windows.document_starts)
