"""Hand-made ledger rows and matrices for the metric tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mfext.metrics.ledger import LedgerRow
from mfext.metrics.transfer_matrix import TransferMatrix


def row(
    stage: int, domain: str, documents: Sequence[tuple[float, int]], step: int = 0, split: str = "validation"
) -> LedgerRow:
    """A row of documents given as (nats, bytes)."""
    nats, sizes = tuple(nats for nats, _ in documents), tuple(size for _, size in documents)
    return LedgerRow(
        stage, step, domain, split, math.fsum(nats), sum(sizes), sum(sizes), len(nats), nats, sizes,
        "hash", "model", 1, 0.0, "2026-01-01T00:00:00+00:00", f"name {stage}",
    )  # fmt: skip


def task_stream(accuracies: Sequence[Sequence[float]], before: Sequence[float] | None = None) -> TransferMatrix:
    """The losses of a classic task stream: L = -a.

    `accuracies[i][j]` after task i on task j, T of each; `before`: accuracies of the untrained model (0 where left
    out). Task t becomes stage t + 1, since stage 0 is the untrained model.
    """
    tasks = len(accuracies)
    rows = [[0.0] * tasks if before is None else list(before), *map(list, accuracies)]
    domains = tuple(f"task{number}" for number in range(tasks))
    losses = tuple(tuple(-accuracy for accuracy in each) for each in rows)
    names = ("untrained", *domains)
    return TransferMatrix(names, domains, losses, {domain: number + 1 for number, domain in enumerate(domains)})
