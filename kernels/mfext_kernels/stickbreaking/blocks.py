"""Stick-breaking attention cut into blocks of work: which queries, which keys, and which of them see which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

QUERIES = 64  # per block
TILE = 256  # keys a block takes at a time before it asks whether any stick is left
ELEMENTS = 1 << 18  # of one score block: 1 MiB in fp32, what a core's second-level cache holds


@dataclass(frozen=True)
class Block:
    """Queries [first, last) of the (batch, head) pairs [pair, pair_end), and their reversed keys from `newest` on.

    Where `starts` is given, keys from number `masked_from` of the block on may lie before a query's start.
    """

    pair: int
    pair_end: int
    first: int
    last: int
    newest: int
    num_keys: int
    masked_from: int
    starts: Tensor | None

    @property
    def pairs(self) -> slice:
        return slice(self.pair, self.pair_end)

    def keys(self, first: int, last: int) -> slice:
        return slice(self.newest + first, self.newest + last)


@dataclass(frozen=True)
class Plan:
    """The shape of one call, its starts, and per query block the least and greatest start of each batch row."""

    batch: int
    length: int
    chosen: int
    heads: int
    width: int
    num_keys: int
    starts_BT: Tensor | None
    least: list[list[int]]
    greatest: list[list[int]]

    @classmethod
    def make(cls, q_BTKHC: Tensor, k_BSHC: Tensor, starts_BT: Tensor | None) -> Plan:
        least: list[list[int]] = []
        greatest: list[list[int]] = []
        if starts_BT is not None:
            blocks = torch.split(starts_BT.detach().clamp(min=0), QUERIES, dim=1)
            least = torch.stack([block.amin(1) for block in blocks]).tolist()
            greatest = torch.stack([block.amax(1) for block in blocks]).tolist()
            starts_BT = starts_BT if any(start for block in greatest for start in block) else None
        batch, length, chosen, heads, width = q_BTKHC.shape
        return cls(batch, length, chosen, heads, width, k_BSHC.shape[1], starts_BT, least, greatest)

    def blocks(self) -> Iterator[Block]:
        """Every block of work, small enough to stay in cache; with starts a block stays inside one batch row."""
        group = self.heads if self.starts_BT is not None else self.batch * self.heads
        for group_first in range(0, self.batch * self.heads, group):
            row = group_first // self.heads
            for number, first in enumerate(range(0, self.length, QUERIES)):
                last = min(first + QUERIES, self.length)
                newest = self.length - last
                num_keys, masked_from, starts = self.num_keys - newest, self.num_keys, None
                if self.starts_BT is not None:
                    masked_from = max(0, num_keys - self.greatest[number][row])
                    num_keys -= self.least[number][row]
                    if masked_from < num_keys:
                        starts = self.starts_BT[row, first:last]
                if num_keys <= 0:
                    continue
                step = self.pairs_at_once(last - first, min(num_keys, TILE))
                for pair in range(group_first, group_first + group, step):
                    end = min(pair + step, group_first + group)
                    yield Block(pair, end, first, last, newest, num_keys, masked_from, starts)

    def pairs_at_once(self, num_queries: int, num_keys: int) -> int:
        """How many (batch, head) pairs' scores fit one buffer."""
        return max(1, ELEMENTS // (num_queries * self.chosen * num_keys))

    def rows(self, block: Block) -> slice:
        """The block's rows among all T*K of a pair."""
        return slice(block.first * self.chosen, block.last * self.chosen)

    def scratch(self, like: Tensor, num_keys: int, count: int) -> list[Tensor]:
        """Flat buffers for the largest block; reused, since fresh pages cost more than the arithmetic."""
        size = min(QUERIES, self.length) * self.chosen * num_keys
        most = max(size, min(ELEMENTS, size * self.batch * self.heads))
        return [like.new_empty(most) for _ in range(count)]


@dataclass(frozen=True)
class Operands:
    """One block's rows of queries (times -1/sqrt(C)) and its keys and values, newest first; backward: dO's rows too."""

    queries_XRC: Tensor
    keys_XSC: Tensor
    values_XSC: Tensor
    grads_XRC: Tensor | None = None

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and dO, which backward has."""
        assert self.grads_XRC is not None, "only backward has gradients"
        return self.queries_XRC, self.keys_XSC, self.values_XSC, self.grads_XRC


@dataclass(frozen=True)
class Gradients:
    """Where one block's gradients go: the rows of dQ are written, dK and dV are added to."""

    queries_XRC: Tensor
    keys_XSC: Tensor
    values_XSC: Tensor
