"""What happened to old domains DURING later stages: worst losses since learned, depth of the stability gap, recovery.

Source: De Lange et al. 2023 (arXiv 2205.13452), restated for losses. A stage's curve on a domain is its rows of the
split "within", by rising step: step k of stage s, the highest step being the end of the stage. A stage starts from the
last row of the stage before it. Stages in which a domain is only ever measured at the end show no gap and give no
number: each curve that a metric looks into needs a row before its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mfext.metrics.ledger import Ledger, LedgerRow
from mfext.metrics.metric_value import HIGHER, LOWER, MetricValue, mean_of

WITHIN = "within"
NO_OLD = "no domain was learned before the last stage"
NO_ROWS = "the run has no within-stage evaluations"
NO_CURVE = "needs within-stage evaluations before and at the end of every later stage, missing for"
NO_START = "needs an evaluation at the end of the stage before and two within the stage, missing for"


@dataclass(frozen=True)
class WithinCurves:
    """Nats per byte by (stage, domain), each a curve of rising steps; `last` is S, the number of the last stage.

    `learned_stage` as in TransferMatrix: 0 for a domain of the base, the latest stage of a learned one, None for a
    bystander.
    """

    curves: Mapping[tuple[int, str], tuple[float, ...]]
    learned_stage: Mapping[str, int | None]
    last: int

    @classmethod
    def from_ledger(cls, ledger: Ledger, learned_stage: Mapping[str, int | None], split: str = WITHIN) -> WithinCurves:
        """The curves of `split`; a row that scored no byte is left out."""
        rows: dict[tuple[int, str], list[LedgerRow]] = {}
        for row in ledger:
            if row.split == split:
                rows.setdefault((row.stage, row.domain), []).append(row)
        curves = {key: _curve(found) for key, found in rows.items()}
        return cls({key: curve for key, curve in curves.items() if curve}, learned_stage, ledger.num_stages - 1)

    def at(self, stage: int, domain: str) -> tuple[float, ...]:
        """The curve of a stage on a domain; empty where there is none."""
        return self.curves.get((stage, domain), ())

    def old_domains(self) -> dict[str, int]:
        """Domains learned before the last stage, the base's included, and the stage they were learned in."""
        return {j: stage for j, stage in self.learned_stage.items() if stage is not None and stage < self.last}

    def later_stages(self) -> list[tuple[str, int]]:
        """All pairs of an old domain and a stage after the one it was learned in."""
        return [(j, i) for j, stage in self.old_domains().items() for i in range(stage + 1, self.last + 1)]


def min_acc(curves: WithinCurves) -> MetricValue:
    """Mean over old j of the highest loss on j in any row of a stage after the one j was learned in.

    The paper's min-ACC: the lowest accuracy since a task was learned, averaged over earlier tasks.
    """
    terms = {j: _worst(curves, j, stage) for j, stage in curves.old_domains().items()}
    return _mean("min_acc", curves, terms, NO_CURVE)


def wc_acc(curves: WithinCurves) -> MetricValue:
    """Mean over trained domains: old ones with their term of `min_acc`, those of the last stage with its end.

    The paper's WC-ACC: 1/k of the current task's accuracy plus (1 - 1/k) min-ACC, k tasks so far.
    """
    terms = {j: _worst(curves, j, stage) for j, stage in curves.old_domains().items()}
    if terms:
        newest = [j for j, stage in curves.learned_stage.items() if stage == curves.last]
        terms |= {j: (curves.at(curves.last, j) or (None,))[-1] for j in newest}
    return _mean("wc_acc", curves, terms, NO_CURVE)


def stability_gap_depth(curves: WithinCurves) -> MetricValue:
    """Mean over all pairs of an old j and a later stage of the stage's highest loss on j minus the loss at its start.

    The start counts as part of the stage, so a term is never negative. Terms are keyed "DOMAIN in stage I".
    """
    gaps = _gaps(curves)
    terms = {key: None if gap is None else gap.worst - gap.start for key, gap in gaps.items()}
    return _mean("stability_gap.depth", curves, terms, NO_START)


def stability_gap_recovery(curves: WithinCurves) -> MetricValue:
    """Share of all depth that is gone by the end of its stage, from 0 (none) to 1 (all; also where the end is better).

    Sum over the pairs of `stability_gap.depth` of (worst - the higher of start and end), divided by the sum of their
    depths: a ratio of sums, since single ratios of tiny depths say nothing. Undefined where nothing rose.
    """
    name, unit = "stability_gap.recovery", "share of the depth"
    depth = stability_gap_depth(curves)
    if depth.value is None:
        return MetricValue(name, None, depth.reason, HIGHER, unit)
    gaps = [gap for gap in _gaps(curves).values() if gap is not None]
    total = math.fsum(gap.worst - gap.start for gap in gaps)
    if total == 0.0:
        return MetricValue(name, None, "no loss rose within a later stage: nothing to recover from", HIGHER, unit)
    recovered = math.fsum(gap.worst - max(gap.start, gap.end) for gap in gaps)
    return MetricValue(name, recovered / total, None, HIGHER, unit)


def measure_stability(curves: WithinCurves) -> dict[str, MetricValue]:
    """Every metric of this file by its name."""
    values = (min_acc(curves), wc_acc(curves), stability_gap_depth(curves), stability_gap_recovery(curves))
    return {value.name: value for value in values}


@dataclass(frozen=True)
class _Gap:
    """Losses on one domain at a stage's start, at their worst from there to its end, and at its end."""

    start: float
    worst: float
    end: float


def _gaps(curves: WithinCurves) -> dict[str, _Gap | None]:
    return {f"{j} in stage {i}": _gap(curves.at(i - 1, j), curves.at(i, j)) for j, i in curves.later_stages()}


def _gap(before: tuple[float, ...], curve: tuple[float, ...]) -> _Gap | None:
    if not before or len(curve) < 2:
        return None
    return _Gap(before[-1], max(before[-1], *curve), curve[-1])


def _worst(curves: WithinCurves, domain: str, learned: int) -> float | None:
    later = [curves.at(stage, domain) for stage in range(learned + 1, curves.last + 1)]
    return max(max(curve) for curve in later) if all(len(curve) >= 2 for curve in later) else None


def _mean(name: str, curves: WithinCurves, terms: Mapping[str, float | None], missing: str) -> MetricValue:
    if not curves.curves:
        return MetricValue(name, None, NO_ROWS, LOWER)
    return mean_of(name, terms, LOWER, none=NO_OLD, missing=missing)


def _curve(rows: list[LedgerRow]) -> tuple[float, ...]:
    losses = [row.nats_per_byte for row in sorted(rows, key=lambda row: row.step)]
    return tuple(loss for loss in losses if loss is not None)
