"""What a run learned: levels, plasticity, forward transfer, and intransigence against reference runs.

Sources: `fwt.gem` Lopez-Paz and Ranzato 2017 (arXiv 1706.08840); `fwt.vs_independent` Wang et al. 2023
(arXiv 2302.00487, FWT against a model trained on the task alone); `average_incremental` Rebuffi et al. 2017
(arXiv 1611.07725); intransigence Chaudhry et al. 2018 (arXiv 1801.10112). They are defined there on accuracies; a score
of -L stands in for the accuracy. Symbols as in transfer_matrix.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mfext.metrics.metric_value import HIGHER, LOWER, Direction, MetricValue, difference, mean, mean_of
from mfext.metrics.transfer_matrix import TransferMatrix

NOTHING_TRAINED = "no trained domain was measured"
NOTHING_LEARNED = "no domain was learned after the base"
NOTHING_TO_TRANSFER = "no domain was first trained after stage 1"


@dataclass(frozen=True)
class References:
    """Losses in nats per byte of reference runs on the same splits, by domain; None where there is no such run.

    `joint`: one model trained on all domains at once. `independent`: per domain, a model trained on it alone.
    """

    joint: Mapping[str, float] | None = None
    independent: Mapping[str, float] | None = None


def learned(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[i-1, j] - L[i, j] over domains j learned in a stage i >= 1: what training gained."""
    stages = {j: matrix.stage_of(j) for j in matrix.new_domains()}
    terms = {j: difference(matrix.at(stage - 1, j), matrix.at(stage, j)) for j, stage in stages.items()}
    return mean_of("learned", terms, HIGHER, none=NOTHING_LEARNED)


def average(matrix: TransferMatrix) -> MetricValue:
    """Mean of the last row over trained domains; bystanders do not count."""
    terms = {j: matrix.at(matrix.last, j) for j in matrix.trained_domains()}
    return mean_of("average", terms, LOWER, none=NOTHING_TRAINED)


def average_incremental(matrix: TransferMatrix) -> MetricValue:
    """Mean over stages i of the mean of L[i, j] over the domains trained so far (first trained in stage <= i).

    Terms are keyed "stage I"; a stage before any training (a random base) has none.
    """
    terms = {}
    for stage in range(matrix.last + 1):
        seen = [matrix.at(stage, j) for j in matrix.trained_domains() if matrix.first_stage_of(j) <= stage]
        known = [loss for loss in seen if loss is not None]
        if seen:
            terms[f"stage {stage}"] = mean(known) if len(known) == len(seen) else None
    return mean_of("average_incremental", terms, LOWER, none=NOTHING_TRAINED)


def fwt_gem(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[0, j] - L[i-1, j] over domains j first trained in a stage i >= 2: what earlier stages gave unasked.

    GEM subtracts a randomly initialised model's score; row 0 stands in for it. Stage 1 is left out, as the first
    task is in GEM: nothing came before it but row 0 itself.
    """
    terms = {j: difference(matrix.at(0, j), loss) for j, loss in _zero_shot(matrix).items()}
    return mean_of("fwt.gem", terms, HIGHER, none=NOTHING_TO_TRANSFER)


def fwt_raw(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[i-1, j], without a baseline, over domains j first trained in a stage i >= 2."""
    return mean_of("fwt.raw", _zero_shot(matrix), LOWER, none=NOTHING_TO_TRANSFER)


def fwt_vs_independent(matrix: TransferMatrix, references: References) -> MetricValue:
    """Mean of independent[j] - L[i, j] over domains j first trained in a stage i >= 2; above 0 the past helped."""
    losses = {j: matrix.at(matrix.first_stage_of(j), j) for j in _zero_shot(matrix)}
    run = _Run("independent", references.independent)
    return _against(run, "fwt.vs_independent", losses, HIGHER, NOTHING_TO_TRANSFER)


def intransigence_joint(matrix: TransferMatrix, references: References) -> MetricValue:
    """Mean of L[i, j] - joint[j] over domains j learned in a stage i >= 1; above 0 the stream learned less."""
    run = _Run("joint", references.joint)
    return _against(run, "intransigence.joint", _diagonal(matrix), LOWER, NOTHING_LEARNED)


def intransigence_independent(matrix: TransferMatrix, references: References) -> MetricValue:
    """Mean of L[i, j] - independent[j] over domains j learned in a stage i >= 1."""
    run = _Run("independent", references.independent)
    return _against(run, "intransigence.independent", _diagonal(matrix), LOWER, NOTHING_LEARNED)


def _zero_shot(matrix: TransferMatrix) -> dict[str, float | None]:
    """L[i-1, j] of every domain first trained in a stage i >= 2."""
    firsts = {j: matrix.first_stage_of(j) for j in matrix.trained_domains()}
    return {j: matrix.at(first - 1, j) for j, first in firsts.items() if first >= 2}


def _diagonal(matrix: TransferMatrix) -> dict[str, float | None]:
    """L[stage j was learned in, j] of every domain learned after the base."""
    return {j: matrix.at(matrix.stage_of(j), j) for j in matrix.new_domains()}


@dataclass(frozen=True)
class _Run:
    """A reference run by name, with its losses if there is one."""

    name: str
    losses: Mapping[str, float] | None


def _against(run: _Run, name: str, losses: Mapping[str, float | None], direction: Direction, none: str) -> MetricValue:
    """Mean of this run's losses minus the reference run's (lower is better), or the reverse (higher is better)."""
    if losses and run.losses is None:
        return MetricValue(name, None, f"needs the losses of the {run.name} run", direction)
    reference = run.losses or {}
    pairs = {j: (loss, reference.get(j)) for j, loss in losses.items()}
    terms = {j: difference(a, b) if direction == LOWER else difference(b, a) for j, (a, b) in pairs.items()}
    missing = f"not measured in this run or in the {run.name} run"
    return mean_of(name, terms, direction, none=none, missing=missing)
