"""Paired bootstrap over documents: is a change in loss larger than the choice of documents explains?

Both models score the same documents; documents are drawn with replacement and both losses move together, which
removes the (large) variance between documents. Source: Efron and Tibshirani 1993, percentile interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mfext.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mfext.metrics.ledger import LedgerRow

PERCENTILES = (2.5, 97.5)
# Draws held at once: 2**20 indices are 8 MB, small enough for the second-level cache to help.
DRAWS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Interval:
    """A change b - a in nats per byte with its 95 % interval.

    `low` and `high` are None exactly where `reason` says why the change is not testable; `difference` is None only
    where nothing was scored at all.
    """

    difference: float | None
    low: float | None
    high: float | None
    reason: str | None = None


@dataclass(frozen=True)
class PairedDocuments:
    """Two models' losses in nats on the same documents, and the documents' UTF-8 bytes."""

    nats_a: Sequence[float]
    nats_b: Sequence[float]
    bytes: Sequence[int]
    name: str = ""

    def __post_init__(self) -> None:
        assert len(self.nats_a) == len(self.nats_b) == len(self.bytes), "the same documents on both sides"


def pair_rows(a: LedgerRow, b: LedgerRow) -> PairedDocuments:
    """The documents of two ledger rows; InputError where they are not the same documents."""
    if (a.split_sha256, a.document_bytes) != (b.split_sha256, b.document_bytes):
        where = f"{a.split} of {a.domain!r} against {b.split} of {b.domain!r}"
        raise InputError("the two measurements are of different documents", where, "evaluate both on the same split")
    return PairedDocuments(a.document_nats, b.document_nats, a.document_bytes, a.domain)


def paired_interval(
    nats_a: Sequence[float], nats_b: Sequence[float], bytes: Sequence[int], *, samples: int, seed: int
) -> Interval:
    """95 % interval of the byte-weighted mean change b - a over documents, in nats per byte."""
    return mean_interval([PairedDocuments(nats_a, nats_b, bytes)], samples=samples, seed=seed)


def mean_interval(pairs: Sequence[PairedDocuments], *, samples: int, seed: int) -> Interval:
    """The same for the plain mean over domains; documents are drawn within each domain, independently."""
    assert samples >= 1, "a bootstrap draws at least once"
    if not pairs:
        return Interval(None, None, None, "not testable: no domain")
    changes = [_changes(pair) for pair in pairs]
    empty = [pair.name for pair, (_, weight_D) in zip(pairs, changes, strict=True) if weight_D.size == 0]
    if empty:
        return Interval(None, None, None, _not_testable("no document", empty))
    # fsum: the order of documents and domains changes nothing, not even the last bit.
    means = [math.fsum(change_D) / math.fsum(weight_D) for change_D, weight_D in changes]
    difference = math.fsum(means) / len(means)
    single = [pair.name for pair, (_, weight_D) in zip(pairs, changes, strict=True) if weight_D.size < 2]
    if single:
        return Interval(difference, None, None, _not_testable("fewer than 2 documents", single))
    streams = np.random.SeedSequence(seed).spawn(len(changes))
    drawn = [
        _resample(change_D, weight_D, samples, np.random.default_rng(stream))
        for (change_D, weight_D), stream in zip(changes, streams, strict=True)
    ]
    low, high = np.percentile(np.mean(drawn, axis=0), PERCENTILES)
    return Interval(difference, float(low), float(high))


def _not_testable(what: str, names: Sequence[str]) -> str:
    named = ", ".join(name for name in names if name)
    return f"not testable: {what}{f' in {named}' if named else ''}"


def _changes(pair: PairedDocuments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Per document: change in nats and bytes. Empty documents say nothing and are left out."""
    weight_D = np.asarray(pair.bytes, dtype=np.float64)
    change_D = np.asarray(pair.nats_b, dtype=np.float64) - np.asarray(pair.nats_a, dtype=np.float64)
    return change_D[weight_D > 0], weight_D[weight_D > 0]


def _resample(
    change_D: NDArray[np.float64], weight_D: NDArray[np.float64], samples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """`samples` byte-weighted means of documents drawn with replacement."""
    num_documents = change_D.size
    rows = max(1, DRAWS_AT_ONCE // num_documents)
    means = []
    for start in range(0, samples, rows):
        drawn_RD = random.integers(num_documents, size=(min(rows, samples - start), num_documents))
        means.append(change_D[drawn_RD].sum(axis=1) / weight_D[drawn_RD].sum(axis=1))
    return np.concatenate(means)
