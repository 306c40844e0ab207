"""Losses and gates per region of documents that change domain on the way.

A document is a tuple of regions, one after another in one context with a single bos before the first. Token p is
predicted from the tokens before it, and so is the g that counts for it: a gate that is to open in a region has seen
nothing of that region when its first token is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mfext.metrics.ledger import bits_per_byte
from mfext.metrics.perplexity import Scorable, Scoring, score_tokens

HALF = 0.5


@dataclass(frozen=True)
class Settling:
    """After how many tokens of a region a gate stays on one side of 1/2, per document; None where it does not."""

    lags: tuple[int | None, ...]

    @property
    def mean(self) -> float | None:
        """Mean over the documents in which it does; None where there are none."""
        known = [lag for lag in self.lags if lag is not None]
        return math.fsum(known) / len(known) if known else None

    @property
    def never(self) -> int:
        """Documents in which it does not."""
        return sum(lag is None for lag in self.lags)


@dataclass(frozen=True)
class GateInRegion:
    """One gate in one region of all documents: mean g over the tokens; when it stays at 1/2 or above, or below."""

    mean_openness: float
    opening: Settling
    closing: Settling


@dataclass(frozen=True)
class Region:
    """One region of all documents together; `gates` is empty where the model has none."""

    nats: float
    tokens: int
    bytes: int
    gates: tuple[GateInRegion, ...]

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits, weighted by bytes."""
        return bits_per_byte(self.nats, self.bytes)


@dataclass(frozen=True)
class RegionText:
    """A region of one document: its token ids and UTF-8 bytes."""

    ids: Sequence[int]
    bytes: int


def measure_regions(model: Scorable, documents: Sequence[Sequence[RegionText]], scoring: Scoring) -> tuple[Region, ...]:
    """The regions of all `documents`, which have equally many, none of them empty.

    The window is made as long as the longest document; `scoring` bounds the positions in a batch as ever.
    DivergedError where a loss is not finite.
    """
    assert documents and all(len(each) == len(documents[0]) for each in documents), "as many regions each"
    assert all(region.ids for document in documents for region in document), "no region is empty"
    texts = [[token for region in document for token in region.ids] for document in documents]
    scores = score_tokens(model, texts, _one_window(scoring, max(len(text) for text in texts)))
    lengths_DR = np.array([[len(region.ids) for region in document] for document in documents])
    ends_DR = scores.offsets_D[:-1, None] + np.cumsum(lengths_DR, axis=1)
    measured = []
    for number, (lengths_D, ends_D) in enumerate(zip(lengths_DR.T, ends_DR.T, strict=True)):
        spans = [slice(end - length, end) for length, end in zip(lengths_D, ends_D, strict=True)]
        measured.append(
            Region(
                math.fsum(float(scores.nats_P[span].sum()) for span in spans),
                int(lengths_D.sum()),
                sum(document[number].bytes for document in documents),
                tuple(_gate([gates_P[span] for span in spans]) for gates_P in scores.gates_PS.T),
            )
        )
    return tuple(measured)


def _one_window(scoring: Scoring, longest: int) -> Scoring:
    """Windows that hold a whole document, and so many of them in a batch that it has no more positions than before."""
    window = longest + longest % 2
    return replace(scoring, window=window, batch_size=max(1, scoring.batch_size * scoring.window // window))


def _gate(documents: Sequence[NDArray[np.float32]]) -> GateInRegion:
    """`documents`: g of the region's tokens, for each document."""
    every_M = np.concatenate(documents)
    return GateInRegion(
        float(every_M.mean(dtype=np.float64)),
        Settling(tuple(_settles(gates_T >= HALF) for gates_T in documents)),
        Settling(tuple(_settles(gates_T <= HALF) for gates_T in documents)),
    )


def _settles(side_T: NDArray[np.bool_]) -> int | None:
    """The tokens before `side_T` stays true to the end; None where it ends false."""
    off = np.flatnonzero(~side_T)
    first = int(off[-1]) + 1 if off.size else 0
    return first if first < side_T.size else None
