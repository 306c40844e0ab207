"""One named number: its value or the reason for having none, its direction and its unit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Direction = Literal["lower is better", "higher is better"]
LOWER: Direction = "lower is better"
HIGHER: Direction = "higher is better"
NATS_PER_BYTE = "nats per byte"
NOT_MEASURED = "not measured in every stage it needs"


@dataclass(frozen=True)
class MetricValue:
    """One named number with its direction and unit; `value` is None exactly where `reason` says why.

    `domains` holds the terms whose plain mean `value` is, by domain or by what the metric's docstring says. They are
    present where they could be computed even if the mean is undefined because another term is missing.
    """

    name: str
    value: float | None
    reason: str | None
    direction: Direction
    unit: str = NATS_PER_BYTE
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


def mean_of(
    name: str,
    terms: Mapping[str, float | None],
    direction: Direction,
    *,
    none: str,
    missing: str = NOT_MEASURED,
    unit: str = NATS_PER_BYTE,
) -> MetricValue:
    """Plain mean of `terms`; undefined with reason `none` without terms, with reason `missing` if one is None."""
    if not terms:
        return MetricValue(name, None, none, direction, unit)
    known = {key: value for key, value in terms.items() if value is not None}
    absent = [key for key in terms if key not in known]
    if absent:
        return MetricValue(name, None, f"{missing}: {', '.join(absent)}", direction, unit, known)
    return MetricValue(name, mean(known.values()), None, direction, unit, known)


def mean(values: Iterable[float]) -> float:
    """Plain mean of at least one number; fsum, so that their order changes nothing, not even the last bit."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def difference(a: float | None, b: float | None) -> float | None:
    """a - b; None where either is."""
    return None if a is None or b is None else a - b
