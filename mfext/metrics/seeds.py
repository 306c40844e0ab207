"""Claims between runs: means over seeds, paired differences of two methods, ratios of means, each with 95 % intervals.

A seed is one independent run. The spread between runs is taken as normal, which few seeds cannot check: Student's t
for means and paired differences, Fieller's theorem (Fieller 1954) for a ratio of means over the same seeds. One seed
settles nothing and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfext.metrics.metric_value import mean

CONFIDENCE = 0.95
BISECTIONS = 80


@dataclass(frozen=True)
class SeedInterval:
    """An estimate over `seeds` with its 95 % interval.

    `low` and `high` are None exactly where `reason` says why the claim is not testable; `estimate` is None only where
    there is none at all.
    """

    estimate: float | None
    low: float | None
    high: float | None
    seeds: tuple[int, ...]
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.low is None) == (self.high is None) == (self.reason is not None), "an interval or a reason"

    def to_json(self) -> dict[str, Any]:
        """One plain JSON object."""
        return {
            "estimate": self.estimate,
            "low": self.low,
            "high": self.high,
            "seeds": list(self.seeds),
            "reason": self.reason,
        }


def mean_over_seeds(values: Mapping[int, float | None]) -> SeedInterval:
    """Mean of one number per seed, plus and minus t(n-1) s / sqrt(n).

    Not testable with fewer than 2 seeds; without an estimate where a seed's number is undefined (None), since leaving
    that run out would choose among runs by their outcome.
    """
    seeds = tuple(sorted(values))
    known = {seed: value for seed, value in values.items() if value is not None}
    undefined = [str(seed) for seed in seeds if seed not in known]
    if undefined or not seeds:
        why = f"undefined for seed {', '.join(undefined)}" if undefined else "0 seeds"
        return SeedInterval(None, None, None, seeds, f"not testable: {why}")
    numbers = [known[seed] for seed in seeds]
    middle = mean(numbers)
    if len(seeds) == 1:
        return SeedInterval(middle, None, None, seeds, "not testable: 1 seed")
    half = _t95(len(seeds)) * math.sqrt(_covariance(numbers, numbers) / len(seeds))
    return SeedInterval(middle, middle - half, middle + half, seeds)


def difference_over_seeds(a: Mapping[int, float | None], b: Mapping[int, float | None]) -> SeedInterval:
    """Mean over the seeds both methods ran of b - a, paired by seed: what the seed does to both drops out."""
    seeds = sorted(a.keys() & b.keys())
    pairs = {seed: (a[seed], b[seed]) for seed in seeds}
    interval = mean_over_seeds({seed: None if x is None or y is None else y - x for seed, (x, y) in pairs.items()})
    return _say_common(interval)


def ratio_over_seeds(numerator: Mapping[int, float | None], denominator: Mapping[int, float | None]) -> SeedInterval:
    """Ratio of the two means over the seeds both methods ran, with Fieller's interval for paired runs.

    For claims such as "forgets at most 1/20 of replay": true at 95 % where `high` <= 1/20. All ratios r are inside for
    which mean(numerator - r * denominator) does not differ from 0 by Student's t. Not testable with fewer than 2 seeds,
    or where the denominator's own interval holds 0: then no ratio, however large, is excluded.
    """
    seeds = tuple(sorted(numerator.keys() & denominator.keys()))
    above, below = ({seed: side[seed] for seed in seeds} for side in (numerator, denominator))
    for side in (mean_over_seeds(above), mean_over_seeds(below)):
        if side.estimate is None:
            return _say_common(side)
    top = [value for value in above.values() if value is not None]
    bottom = [value for value in below.values() if value is not None]
    a, b = mean(top), mean(bottom)
    ratio = a / b if b else None
    if len(seeds) == 1:
        return _say_common(SeedInterval(ratio, None, None, seeds, "not testable: 1 seed"))
    # Roots r of (a - r b)^2 = u_aa - 2 r u_ab + r^2 u_bb, where u = t^2 times the (co)variance of the means.
    scale = _t95(len(seeds)) ** 2 / len(seeds)
    u_aa, u_ab, u_bb = (scale * _covariance(x, y) for x, y in ((top, top), (top, bottom), (bottom, bottom)))
    divisor = b * b - u_bb
    if ratio is None or divisor <= 0:
        return SeedInterval(ratio, None, None, seeds, "not testable: the denominator may be 0")
    # The discriminant with a^2 b^2 taken out, which would swallow a narrow interval's digits.
    discriminant = b * b * u_aa - 2 * a * b * u_ab + a * a * u_bb - (u_aa * u_bb - u_ab * u_ab)
    middle, half = (a * b - u_ab) / divisor, math.sqrt(max(0.0, discriminant)) / divisor
    return SeedInterval(ratio, middle - half, middle + half, seeds)


def student_t_quantile(central: float, degrees: int) -> float:
    """t with P(|T| <= t) = `central` (0 < central < 1) for T of Student's distribution with `degrees` >= 1.

    Inverts the finite series of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, in the angle atan(t / sqrt(degrees)).
    """
    assert 0 < central < 1 and degrees >= 1, "a probability and at least one degree of freedom"
    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < central else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle))."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for number in range(2 + odd, degrees - 1, 2):
        term *= (number - 1) / number * math.cos(angle) ** 2
        total += term
    series = math.sin(angle) * total
    return (angle + series) * 2 / math.pi if odd else series


def _t95(num_seeds: int) -> float:
    return student_t_quantile(CONFIDENCE, num_seeds - 1)


def _covariance(a: Sequence[float], b: Sequence[float]) -> float:
    """Sample covariance, with n - 1."""
    mean_a, mean_b = mean(a), mean(b)
    return math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / (len(a) - 1)


def _say_common(interval: SeedInterval) -> SeedInterval:
    """The same, its reason saying that the seeds counted are those both methods ran."""
    if interval.reason is None or not interval.reason.endswith(("seed", "seeds")):
        return interval
    reason = f"{interval.reason} run by both"
    return SeedInterval(interval.estimate, None, None, interval.seeds, reason)
