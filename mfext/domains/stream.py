"""The order tokens are read in, as a pure function of (seed, stage, step, place in the global batch).

An epoch of one part: its documents shuffled, written one after another as `[bos] doc [bos] doc`,
cut into windows of T + 1 tokens at stride T (the last token of a window is the first of the
next: it is a target here and an input there); the tail shorter than a window is left out, and
falls elsewhere in every epoch. The windows of all parts are read in one shuffled order, so parts
mix in proportion to their size. Nothing is kept between batches but caches of what the numbers
decide, so resuming needs three integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mfext.domains.packing import PackedDocuments
from mfext.errors import InputError

Batch = dict[str, torch.Tensor]
Indices = NDArray[np.int64]
CACHED_EPOCHS = 2  # a batch may lie across the end of an epoch


def shuffled(count: int, *key: object) -> Indices:
    """A permutation of range(count) drawn by `key`, the same on every machine and numpy version.

    Sorts the numbers by a 64-bit mixing function (splitmix64, Steele et al. 2014), which maps
    no two of them to one value.
    """
    name = ":".join(["mfext-shuffle-1", *map(str, key)])
    seed = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8")
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable").astype(np.int64)


def place_in_batch(batch_size: int, rank: int, world: int, micro: int, accumulation: int) -> Indices:
    """Which rows of a global batch are process `rank`'s micro-batch `micro`. InputError where they cannot be shared."""
    share = world * accumulation
    if batch_size % share:
        raise InputError(
            f"batch_size={batch_size} cannot be shared evenly",
            f"{world} processes * {accumulation} micro-batches",
            f"make training.batch_size a multiple of {share}",
        )
    assert 0 <= rank < world and 0 <= micro < accumulation
    count = batch_size // share
    first = (micro * world + rank) * count
    return np.arange(first, first + count, dtype=np.int64)


class Batches(Protocol):
    """What gives a batch as a pure function of the step and the place in it."""

    def batch(self, step: int, *, rank: int = 0, world: int = 1, micro: int = 0, accumulation: int = 1) -> Batch: ...


@dataclass(frozen=True)
class _PartEpoch:
    """One part's documents in the order of one epoch: where each starts, and how far from there its
    tokens lie in the file (file position = position in the epoch + shift)."""

    starts: Indices
    shifts: Indices


@dataclass(frozen=True)
class _Epoch:
    order: Indices
    parts: tuple[_PartEpoch, ...]


class TokenStream:
    """Batches of packed windows over one or more parts.

    A batch is a dict of (b, T) int64 tensors: `input_ids`, `targets` (the next token) and
    `document_starts` (index in the window of the last bos at or before the position; 0 where
    the document began before the window).
    """

    def __init__(
        self, parts: Sequence[PackedDocuments], *, sequence_length: int, batch_size: int, seed: int, stage: int
    ) -> None:
        """Raises InputError where a part is shorter than one window."""
        assert parts and sequence_length >= 1 and batch_size >= 1
        self.parts = tuple(parts)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.stage = stage
        for part in self.parts:
            if part.num_tokens <= sequence_length:
                raise InputError(
                    f"a train split of {part.num_tokens} tokens is shorter than one window",
                    f"sequence_length={sequence_length} needs {sequence_length + 1}",
                    "give more text or a shorter training.sequence_length",
                )
        windows = [(part.num_tokens - 1) // sequence_length for part in self.parts]
        self._first_window: Indices = np.cumsum([0, *windows])
        self._epochs: dict[int, _Epoch] = {}

    @property
    def windows_per_epoch(self) -> int:
        """Windows of all parts together in one epoch."""
        return int(self._first_window[-1])

    @property
    def tokens_per_epoch(self) -> int:
        """Input tokens of one epoch: windows * sequence_length."""
        return self.windows_per_epoch * self.sequence_length

    def batch(self, step: int, *, rank: int = 0, world: int = 1, micro: int = 0, accumulation: int = 1) -> Batch:
        """Process `rank`'s micro-batch number `micro` of the global batch of `step`.

        Micro-batches hold batch_size / (world * accumulation) rows; in the order (micro, rank)
        they are the rows of the global batch. Raises InputError where that does not divide.
        """
        return self.rows(place_in_batch(self.batch_size, rank, world, micro, accumulation) + step * self.batch_size)

    def dataset(
        self, start_step: int, end_step: int, accumulation: int = 1, rank: int = 0, world: int = 1
    ) -> StreamDataset:
        """Micro-batches of the steps start_step .. end_step - 1 as a sized map-style Dataset."""
        return StreamDataset(self, start_step, end_step, accumulation, (rank, world))

    def rows(self, samples: Indices) -> Batch:
        """The windows with these numbers (>= 0) in the order of all epochs."""
        length = self.sequence_length
        tokens = np.empty((len(samples), length + 1), dtype=np.int64)
        starts = np.empty((len(samples), length), dtype=np.int64)
        epochs, places = np.divmod(samples, self.windows_per_epoch)
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            rows = np.flatnonzero(epochs == number)
            windows = epoch.order[places[rows]]
            owners = np.searchsorted(self._first_window, windows, side="right") - 1
            for owner in np.unique(owners):
                mine = owners == owner
                begins = (windows[mine] - self._first_window[owner]) * length
                self._fill(self.parts[owner], epoch.parts[owner], begins, (tokens, starts, rows[mine]))
        return {
            "input_ids": torch.from_numpy(tokens[:, :-1].copy()),
            "targets": torch.from_numpy(tokens[:, 1:].copy()),
            "document_starts": torch.from_numpy(starts),
        }

    def _fill(
        self, part: PackedDocuments, epoch: _PartEpoch, begins: Indices, into: tuple[Indices, Indices, Indices]
    ) -> None:
        tokens, starts, rows = into
        positions = begins[:, None] + np.arange(self.sequence_length + 1)
        documents = np.searchsorted(epoch.starts, positions.ravel(), side="right").reshape(positions.shape) - 1
        tokens[rows] = part.tokens[positions + epoch.shifts[documents]]
        starts[rows] = np.maximum(epoch.starts[documents[:, :-1]] - begins[:, None], 0)

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            while len(self._epochs) >= CACHED_EPOCHS:
                self._epochs.pop(next(iter(self._epochs)))
            key = (self.seed, self.stage, number)
            parts = tuple(_part_epoch(part, *key, "documents", index) for index, part in enumerate(self.parts))
            self._epochs[number] = _Epoch(shuffled(self.windows_per_epoch, *key, "windows"), parts)
        return self._epochs[number]


def _part_epoch(part: PackedDocuments, *key: object) -> _PartEpoch:
    order = shuffled(part.num_documents, *key)
    lengths = np.diff(part.offsets)[order]
    starts = np.cumsum(lengths) - lengths
    return _PartEpoch(starts, part.offsets[:-1][order] - starts)


class StreamDataset(Dataset[Batch]):
    """Item i is the i-th micro-batch from `start_step` on: for DataLoader(batch_size=None, shuffle=False)."""

    def __init__(
        self, stream: Batches, start_step: int, end_step: int, accumulation: int, process: tuple[int, int]
    ) -> None:
        self._stream = stream
        self._start_step = start_step
        self._num_steps = max(end_step - start_step, 0)
        self._accumulation = accumulation
        self._rank, self._world = process

    def __len__(self) -> int:
        return self._num_steps * self._accumulation

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, micro = divmod(index, self._accumulation)
        return self._stream.batch(
            self._start_step + step, rank=self._rank, world=self._world, micro=micro, accumulation=self._accumulation
        )
