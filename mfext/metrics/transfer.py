"""Forgetting and learning as pure functions of the matrix L[i, j]: nats per byte on domain j after stage i.

Five toolkits' "forgetting" disagree in value and sign on the same matrix, so each variant here has its own name.
L is a loss (lower is better), S is the last stage, stage 0 is the untouched base. "Old" domains are those learned
before stage S. An undefined number is None with a reason, never a stand-in.
Sources: `bwt.gem` Lopez-Paz and Ranzato 2017 (arXiv 1706.08840); `forgetting.max` Chaudhry et al. 2018
(arXiv 1801.10112). Both are defined there on accuracies; a score of -L stands in for the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mfext.errors import InputError
from mfext.metrics.ledger import Ledger

Direction = Literal["lower is better", "higher is better"]
LOWER: Direction = "lower is better"
HIGHER: Direction = "higher is better"


@dataclass(frozen=True)
class MetricValue:
    """One named number with its direction and unit; `value` is None exactly where `reason` says why.

    `domains` holds the terms whose plain mean `value` is. They are present where they could be computed even if the
    mean is undefined because another domain's measurement is missing.
    """

    name: str
    value: float | None
    reason: str | None
    direction: Direction
    unit: str = "nats per byte"
    domains: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.reason is not None), "either a value or a reason"

    def to_json(self) -> dict[str, Any]:
        """One plain JSON object."""
        return {
            "value": self.value,
            "reason": self.reason,
            "direction": self.direction,
            "unit": self.unit,
            "domains": dict(self.domains),
        }


@dataclass(frozen=True)
class TransferMatrix:
    """L[i, j] as rows of stages and columns of domains; None where it was not measured.

    `learned_stage[domain]`: 0 for a domain of the base, i for one learned in stage i, None for a bystander.
    """

    stage_names: tuple[str, ...]
    domains: tuple[str, ...]
    nll_per_byte: tuple[tuple[float | None, ...], ...]
    learned_stage: Mapping[str, int | None]

    def __post_init__(self) -> None:
        assert len(self.nll_per_byte) == len(self.stage_names) >= 1, "one row per stage, the base's at least"
        assert all(len(row) == len(self.domains) for row in self.nll_per_byte), "one column per domain"
        assert len(set(self.domains)) == len(self.domains), "a domain is one column"
        assert set(self.learned_stage) == set(self.domains), "learned_stage names every domain"
        stages = [stage for stage in self.learned_stage.values() if stage is not None]
        assert all(0 <= stage < len(self.stage_names) for stage in stages), "domains are learned in existing stages"

    @classmethod
    def from_ledger(
        cls,
        ledger: Ledger,
        base_domains: Sequence[str],
        learned: Mapping[str, int],
        bystanders: Sequence[str] = (),
        split: str = "validation",
    ) -> TransferMatrix:
        """The matrix of a run's `split`, from byte-weighted sums, each stage's highest step.

        Columns: the base's domains, then the learned ones by stage, then bystanders. A domain in several lists counts
        as learned first, then as the base's: what was trained on is no bystander. InputError where `learned` names
        a stage the ledger does not have.
        """
        last = max(ledger.num_stages - 1, 0)
        late = {domain: stage for domain, stage in learned.items() if not 0 <= stage <= last}
        if late:
            raise InputError("the ledger lacks the stage a domain was learned in", late, f"its last stage is {last}")
        by_stage = sorted((domain for domain in learned if domain not in base_domains), key=lambda name: learned[name])
        stages: dict[str, int | None] = {domain: learned.get(domain, 0) for domain in (*base_domains, *by_stage)}
        stages = {**stages, **{domain: None for domain in bystanders if domain not in stages}}
        domains = tuple(stages)
        names, matrix = [], []
        for stage in range(last + 1):
            rows = [ledger.at(stage, domain, split) for domain in domains]
            names.append(next((row.stage_name for row in rows if row is not None), f"stage {stage}"))
            matrix.append(tuple(None if row is None else row.nats_per_byte for row in rows))
        return cls(tuple(names), domains, tuple(matrix), stages)

    @property
    def last(self) -> int:
        """S, the number of the last stage."""
        return len(self.stage_names) - 1

    def at(self, stage: int, domain: str) -> float | None:
        """L[stage, domain]."""
        return self.nll_per_byte[stage][self.domains.index(domain)]

    def old_domains(self) -> tuple[str, ...]:
        """Domains learned before the last stage, the base's included."""
        stages = self.learned_stage
        return tuple(name for name in self.domains if (stage := stages[name]) is not None and stage < self.last)

    def base_domains(self) -> tuple[str, ...]:
        """Domains the untouched base knew."""
        return tuple(name for name in self.domains if self.learned_stage[name] == 0)

    def stage_of(self, domain: str) -> int:
        """The stage a trained domain was learned in."""
        stage = self.learned_stage[domain]
        assert stage is not None, f"{domain} is a bystander"
        return stage


Term = Callable[[str], float | None]


def _mean(name: str, domains: Sequence[str], none: str, direction: Direction, term: Term) -> MetricValue:
    """Mean of `term` over `domains`; undefined with reason `none` if there are none, or if a term is missing."""
    if not domains:
        return MetricValue(name, None, none, direction)
    terms = {domain: term(domain) for domain in domains}
    known = {domain: value for domain, value in terms.items() if value is not None}
    missing = [domain for domain in domains if domain not in known]
    if missing:
        reason = f"not measured in every stage it needs: {', '.join(missing)}"
        return MetricValue(name, None, reason, direction, domains=known)
    return MetricValue(name, math.fsum(known.values()) / len(known), None, direction, domains=known)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _above_best(matrix: TransferMatrix, domain: str, stages: range) -> float | None:
    """L[S, domain] minus the lowest loss in `stages`; None where any of them was not measured."""
    values = [matrix.at(stage, domain) for stage in stages]
    known = [value for value in values if value is not None]
    return _difference(matrix.at(matrix.last, domain), min(known)) if len(known) == len(values) else None


NO_OLD = "no domain was learned before the last stage"


def forgetting_base(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[S, j] - L[0, j] over the base's domains: what growing cost its user."""
    domains = matrix.base_domains() if matrix.last > 0 else ()
    none = "no stage after the base" if matrix.last == 0 else "no domain of the base is known"
    return _mean(
        "forgetting.base", domains, none, LOWER, lambda j: _difference(matrix.at(matrix.last, j), matrix.at(0, j))
    )


def forgetting_first_last(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[S, j] - L[stage j was learned in, j]."""
    return _mean(
        "forgetting.first_last",
        matrix.old_domains(),
        NO_OLD,
        LOWER,
        lambda j: _difference(matrix.at(matrix.last, j), matrix.at(matrix.stage_of(j), j)),
    )


def forgetting_max(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[S, j] - min over l < S of L[l, j]; negative where the last stage is the best."""
    return _mean(
        "forgetting.max",
        matrix.old_domains(),
        NO_OLD,
        LOWER,
        lambda j: _above_best(matrix, j, range(matrix.last)),
    )


def forgetting_max_incl_last(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[S, j] - min over l <= S of L[l, j]; never negative."""
    return _mean(
        "forgetting.max_incl_last",
        matrix.old_domains(),
        NO_OLD,
        LOWER,
        lambda j: _above_best(matrix, j, range(matrix.last + 1)),
    )


def bwt_gem(matrix: TransferMatrix) -> MetricValue:
    """Mean over old j of L[stage j was learned in, j] - L[S, j]: the negative of `forgetting.first_last`.

    GEM's backward transfer is last minus diagonal on scores; on losses the sign turns, so positive stays good.
    """
    return _mean(
        "bwt.gem",
        matrix.old_domains(),
        NO_OLD,
        HIGHER,
        lambda j: _difference(matrix.at(matrix.stage_of(j), j), matrix.at(matrix.last, j)),
    )


def learned(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[i-1, j] - L[i, j] over domains j learned in a stage i >= 1: what training gained."""
    domains = [domain for domain in matrix.domains if (matrix.learned_stage[domain] or 0) > 0]

    def term(j: str) -> float | None:
        stage = matrix.stage_of(j)
        return _difference(matrix.at(stage - 1, j), matrix.at(stage, j))

    return _mean("learned", domains, "no domain was learned after the base", HIGHER, term)


def bystander(matrix: TransferMatrix) -> MetricValue:
    """Mean of L[S, j] - L[0, j] over domains never trained, which growth must not hurt."""
    domains = [domain for domain in matrix.domains if matrix.learned_stage[domain] is None]
    none = "no domain was measured that was never trained"
    if matrix.last == 0:
        domains, none = [], "no stage after the base"
    return _mean("bystander", domains, none, LOWER, lambda j: _difference(matrix.at(matrix.last, j), matrix.at(0, j)))


def average(matrix: TransferMatrix) -> MetricValue:
    """Mean of the last row over trained domains; bystanders do not count."""
    domains = [domain for domain in matrix.domains if matrix.learned_stage[domain] is not None]
    return _mean("average", domains, "no trained domain was measured", LOWER, lambda j: matrix.at(matrix.last, j))


METRICS: tuple[Callable[[TransferMatrix], MetricValue], ...] = (
    forgetting_base,
    forgetting_first_last,
    forgetting_max,
    forgetting_max_incl_last,
    bwt_gem,
    learned,
    bystander,
    average,
)


def measure(matrix: TransferMatrix) -> dict[str, MetricValue]:
    """Every metric of this file by its name (`forgetting.base`, `bwt.gem`, ...)."""
    values = [metric(matrix) for metric in METRICS]
    return {value.name: value for value in values}
