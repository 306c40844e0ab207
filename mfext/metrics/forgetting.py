"""What a run lost, or won back, on domains it was not training: forgetting, backward transfer, bystanders.

Sources: `bwt.gem` Lopez-Paz and Ranzato 2017 (arXiv 1706.08840); `bwt.pairs` Diaz-Rodriguez et al. 2018
(arXiv 1810.13166); `forgetting.max` Chaudhry et al. 2018 (arXiv 1801.10112). They are defined there on accuracies; a
score of -L stands in for the accuracy. Symbols as in transfer_matrix.py; "old" domains are those learned before stage
S, a domain trained in several stages in the latest of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from mfext.metrics.metric_value import HIGHER, LOWER, MetricValue, difference, mean_of
from mfext.metrics.transfer_matrix import TransferMatrix

NO_OLD = "no domain was learned before the last stage"
ONLY_BASE = "no stage after the base"


def forgetting_base(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[S, j] - L[0, j] over the base's domains: what growing cost its user."""
    none = ONLY_BASE if matrix.last == 0 else "no domain of the base is known"
    return mean_of("forgetting.base", _since_base(matrix, matrix.base_domains()), LOWER, none=none)


def forgetting_first_last(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[S, j] - L[stage j was learned in, j]."""
    terms = {j: difference(matrix.at(matrix.last, j), matrix.at(matrix.stage_of(j), j)) for j in matrix.old_domains()}
    return mean_of("forgetting.first_last", terms, LOWER, none=NO_OLD)


def forgetting_max(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[S, j] - min over l < S of L[l, j]; negative where the last stage is the best."""
    terms = {j: _above_best(matrix, j, range(matrix.last)) for j in matrix.old_domains()}
    return mean_of("forgetting.max", terms, LOWER, none=NO_OLD)


def forgetting_max_incl_last(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[S, j] - min over l <= S of L[l, j]; never negative."""
    terms = {j: _above_best(matrix, j, range(matrix.last + 1)) for j in matrix.old_domains()}
    return mean_of("forgetting.max_incl_last", terms, LOWER, none=NO_OLD)


def bwt_gem(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[stage j was learned in, j] - L[S, j]: the negative of `forgetting.first_last`.

    GEM's backward transfer is last minus diagonal on scores; on losses the sign turns, so positive stays good.
    """
    terms = {j: difference(matrix.at(matrix.stage_of(j), j), matrix.at(matrix.last, j)) for j in matrix.old_domains()}
    return mean_of("bwt.gem", terms, HIGHER, none=NO_OLD)


def bwt_pairs(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[stage j was learned in, j] - L[i, j] over ALL pairs of an old j and a stage i after it.

    Terms are keyed "DOMAIN after stage I". Every pair weighs the same, so early domains weigh more than late ones.
    """
    terms = {
        f"{j} after stage {i}": difference(matrix.at(matrix.stage_of(j), j), matrix.at(i, j))
        for j in matrix.old_domains()
        for i in range(matrix.stage_of(j) + 1, matrix.last + 1)
    }
    return mean_of("bwt.pairs", terms, HIGHER, none=NO_OLD)


def bystander(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[S, j] - L[0, j] over domains never trained, which growth must not hurt."""
    domains = [domain for domain in matrix.domains if matrix.learned_stage[domain] is None]
    none = ONLY_BASE if matrix.last == 0 else "no domain was measured that was never trained"
    return mean_of("bystander", _since_base(matrix, domains), LOWER, none=none)


def _since_base(matrix: TransferMatrix, domains: Iterable[str]) -> dict[str, float | None]:
    if matrix.last == 0:
        return {}
    return {j: difference(matrix.at(matrix.last, j), matrix.at(0, j)) for j in domains}


def _above_best(matrix: TransferMatrix, domain: str, stages: range) -> float | None:
    """L[S, domain] minus the lowest loss in `stages`; None where any of them was not measured."""
    values = [matrix.at(stage, domain) for stage in stages]
    known = [value for value in values if value is not None]
    return difference(matrix.at(matrix.last, domain), min(known)) if len(known) == len(values) else None
