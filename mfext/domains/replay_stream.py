"""New text with old text mixed in: a fixed share of all windows comes from a buffer.

Window number n of the stage is a buffer window where floor((n + 1) * rate) exceeds floor(n * rate), so the share is
exact over any long run and the order is a pure function of (seed, stage, step), as the streams it is made of are.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from mfext.domains.stream import Batch, Indices, StreamDataset, TokenStream, place_in_batch
from mfext.errors import InputError


class ReplayStream:
    """`new` with `rate` of its rows taken from `buffer` instead, each read in its own order."""

    def __init__(self, new: TokenStream, buffer: TokenStream, rate: float) -> None:
        """Raises InputError where `rate` is not between 0 and 1."""
        if not 0 < rate < 1:
            raise InputError(f"replay.rate={rate}", "replay", "a share of the windows between 0 and 1")
        assert (new.sequence_length, new.batch_size) == (buffer.sequence_length, buffer.batch_size)
        self.new, self.buffer = new, buffer
        self.rate = Fraction(str(rate))

    def batch(self, step: int, *, rank: int = 0, world: int = 1, micro: int = 0, accumulation: int = 1) -> Batch:
        """As TokenStream.batch: one process's micro-batch of a global batch."""
        size = self.new.batch_size
        return self._rows(place_in_batch(size, rank, world, micro, accumulation) + step * size)

    def dataset(
        self, start_step: int, end_step: int, accumulation: int = 1, rank: int = 0, world: int = 1
    ) -> StreamDataset:
        """Micro-batches of the steps start_step .. end_step - 1 as a sized map-style Dataset."""
        return StreamDataset(self, start_step, end_step, accumulation, (rank, world))

    def _rows(self, samples: Indices) -> Batch:
        before = np.array([self._replayed(int(sample)) for sample in samples], dtype=np.int64)
        after = np.array([self._replayed(int(sample) + 1) for sample in samples], dtype=np.int64)
        old = after > before
        parts = []
        if not old.all():
            parts.append((np.flatnonzero(~old), self.new.rows((samples - before)[~old])))
        if old.any():
            parts.append((np.flatnonzero(old), self.buffer.rows(before[old])))
        back = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in parts]), kind="stable"))
        return {key: torch.cat([rows[key] for _, rows in parts])[back] for key in parts[0][1]}

    def _replayed(self, count: int) -> int:
        """How many of the first `count` windows come from the buffer."""
        return count * self.rate.numerator // self.rate.denominator
