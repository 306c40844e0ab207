"""What a loss costs: tokens and time until each of several models first reaches the same validation loss.

Curves are measured points of validation loss over training; between two points the loss is taken as linear in tokens
(and time as linear in tokens there). A level is reached where a curve first falls to it: later rises do not unmake it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Curve:
    """One model's training: loss in nats per byte after `tokens` tokens and `cpu_s` seconds, both rising."""

    name: str
    tokens: tuple[float, ...]
    cpu_s: tuple[float, ...]
    loss: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.cpu_s) == len(self.loss) > 0, "points of one length, at least one"
        assert all(a < b for a, b in pairwise(self.tokens)), "tokens rise"
        assert all(a < b for a, b in pairwise(self.cpu_s)), "time rises"
        assert all(math.isfinite(each) for each in self.loss), "losses are finite"


@dataclass(frozen=True)
class Reached:
    """Where a model first reached a level; both numbers None exactly where `reason` says why."""

    tokens: float | None
    cpu_s: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Level:
    """One loss in nats per byte, where each model reached it, and each model's cost over the reference's.

    `token_ratio` and `time_ratio` are own / reference: above 1 the reference needs less. None where either of the two
    never got there.
    """

    loss: float
    reached: Mapping[str, Reached]
    token_ratio: Mapping[str, float | None]
    time_ratio: Mapping[str, float | None]


def reach(curve: Curve, loss: float) -> Reached:
    """Where `curve` first falls to `loss`; None with a reason where it is below from the start, or never."""
    if curve.loss[0] < loss:
        return Reached(None, None, f"below this loss at its first measurement ({curve.loss[0]:.4f} nats per byte)")
    if curve.loss[0] == loss:
        return Reached(curve.tokens[0], curve.cpu_s[0])
    for before in range(len(curve.loss) - 1):
        high, low = curve.loss[before], curve.loss[before + 1]
        if low <= loss:
            share = (high - loss) / (high - low)
            return Reached(_between(curve.tokens, before, share), _between(curve.cpu_s, before, share))
    return Reached(None, None, f"never reached this loss (lowest: {min(curve.loss):.4f} nats per byte)")


def common_levels(curves: Sequence[Curve], count: int) -> tuple[float, ...]:
    """`count` losses that every curve reached, in falling order: evenly spaced from where all have begun (left out)
    down to the lowest they share. Empty where one curve begins below where another ends.
    """
    assert count >= 1, "at least one level"
    top, bottom = min(curve.loss[0] for curve in curves), max(min(curve.loss) for curve in curves)
    if top <= bottom:
        return ()
    # The last is the bottom itself, not a sum that rounds to just below it.
    return (*(top - (top - bottom) * number / count for number in range(1, count)), bottom)


def compare_efficiency(curves: Sequence[Curve], reference: str, losses: Sequence[float]) -> tuple[Level, ...]:
    """Every loss of `losses` with each curve's cost of reaching it, against the curve named `reference`."""
    assert reference in {curve.name for curve in curves}, "the reference is one of the curves"
    levels = []
    for loss in losses:
        reached = {curve.name: reach(curve, loss) for curve in curves}
        base = reached[reference]
        tokens = {name: _ratio(each.tokens, base.tokens) for name, each in reached.items()}
        times = {name: _ratio(each.cpu_s, base.cpu_s) for name, each in reached.items()}
        levels.append(Level(loss, reached, tokens, times))
    return tuple(levels)


def cost_at_loss(points: Sequence[tuple[float, float]], loss: float) -> tuple[float | None, str | None]:
    """Cost of a model of `loss`, read between (loss, cost) points of models of one family trained alike.

    The logarithm of the cost is taken as linear in the loss between neighbours; outside the points there is no answer
    but a reason. Used for inference: what a dense model as good as the reference would cost a token.
    """
    ordered = sorted(points)
    if len(ordered) < 2 or not ordered[0][0] <= loss <= ordered[-1][0]:
        span = f"{ordered[0][0]:.4f} to {ordered[-1][0]:.4f}" if ordered else "no points"
        return None, f"{loss:.4f} nats per byte lies outside the losses measured ({span})"
    for (low, low_cost), (high, high_cost) in pairwise(ordered):
        if low <= loss <= high:
            share = (loss - low) / (high - low) if high > low else 0.0
            return math.exp(math.log(low_cost) + share * (math.log(high_cost) - math.log(low_cost))), None
    raise AssertionError("a loss within the span lies between two neighbours")


def _between(values: Sequence[float], before: int, share: float) -> float:
    return values[before] + share * (values[before + 1] - values[before])


def _ratio(own: float | None, reference: float | None) -> float | None:
    return None if own is None or reference is None or reference == 0 else own / reference
