"""Geometry of a scatter plot: where dots, whiskers, ticks and names lie, in per cent of the plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mfext.report.charts import UNITS, Mark, nice_ticks
from mfext.report.quantities import number, signed
from mfext.report.report import Point, Scatter, Spread

# The narrowest plot that shows names beside the dots, in px: names that are apart there are apart on any wider page.
WIDTH, HEIGHT = 520.0, 380.0
LETTER, LINE, DOT = 7.2, 16.0, 12.0
# Places for a name, the best first: (word for the style sheet, left edge in its widths, bottom edge in lines).
PLACES = (("right", 0.0, 0.1), ("left", -1.0, 0.1), ("above", -0.5, 0.7), ("below", -0.5, -1.7))
ROOM = 0.07
# A dot this many times further from the best than half of them is pinned to the upper edge: it would flatten the rest.
FAR = 6.0
FEW = 4
PINNED = 96.5
TICKS_APART = 0.13


@dataclass(frozen=True)
class Dot:
    """A dot at (x, y) per cent from bottom left, its letter and name, and its intervals' ends (None: no interval)."""

    name: str
    letter: str
    x: float
    y: float
    x_whisker: tuple[float, float] | None
    y_whisker: tuple[float, float] | None
    on_front: bool
    side: str
    hint: str


@dataclass(frozen=True)
class DrawnScatter:
    """Dots on one scale. `front` joins the best trade-offs, as an SVG path."""

    dots: tuple[Dot, ...]
    x_ticks: tuple[Mark, ...]
    y_ticks: tuple[Mark, ...]
    front: str
    zero: float | None


Scale = Callable[[float], float]


def draw_scatter(section: Scatter) -> DrawnScatter:
    """Places the dots; both axes hold all intervals, the horizontal one zero as well."""
    bend = bending(section.linear_below)
    at_x, (left, right) = _axis([point.x for point in section.points], bend, hold=(0.0,))
    limit = highest_shown([point.y.value for point in section.points])
    at_y, (bottom, top) = _axis([point.y for point in section.points if point.y.value <= limit], float, hold=())
    names = [point.name if point.y.value <= limit else _beyond(point) for point in section.points]
    spots = [(at_x(point.x.value), min(at_y(point.y.value), PINNED)) for point in section.points]
    sides = name_places(names, spots)
    dots = tuple(
        _dot(replace(point, name=names[index]), chr(ord("A") + index % 26), (at_x, at_y), sides[index])
        for index, point in enumerate(section.points)
    )
    x_ticks = _bent_ticks(left, right, section.linear_below)
    y_ticks = nice_ticks(bottom, top, 5)
    places = max((_decimals(tick) for tick in y_ticks), default=0)
    return DrawnScatter(
        dots,
        tuple(Mark(at_x(tick), signed(tick, _decimals(tick))) for tick in x_ticks),
        tuple(Mark(at_y(tick), number(tick, places)) for tick in y_ticks),
        _front([dot for dot in dots if dot.on_front]),
        at_x(0.0) if section.points else None,
    )


def highest_shown(values: Sequence[float]) -> float:
    """The largest of `values` that the vertical axis still shows."""
    if len(values) < FEW:
        return max(values, default=0.0)
    ordered = sorted(values)
    half = ordered[(len(ordered) - 1) // 2] - ordered[0]
    return max(value for value in ordered if value <= ordered[0] + FAR * half or not half)


def _beyond(point: Point) -> str:
    return f"{point.name} ↑ {number(point.y.value, 2)}"


def bending(linear_below: float | None) -> Scale:
    """Linear near zero and logarithmic beyond: sign(x) log10(1 + |x| / linear_below)."""
    if linear_below is None:
        return float
    return lambda value: math.copysign(math.log10(1 + abs(value) / linear_below), value)


def _axis(spreads: Sequence[Spread], bend: Scale, hold: tuple[float, ...]) -> tuple[Scale, tuple[float, float]]:
    """The scale to per cent, and the lowest and highest bent value it shows."""
    edges = [edge for each in spreads for edge in (each.value, each.low, each.high) if edge is not None]
    bent = [bend(edge) for edge in (*edges, *hold)] or [0.0, 1.0]
    room = ROOM * (max(bent) - min(bent)) or 0.5
    low, high = min(bent) - room, max(bent) + room
    return lambda value: round(100 * (bend(value) - low) / (high - low), 3), (low, high)


def _bent_ticks(low: float, high: float, linear_below: float | None) -> tuple[float, ...]:
    if linear_below is None:
        return nice_ticks(low, high, 5)
    bend = bending(linear_below)
    powers = [linear_below * 10.0**power for power in range(12)]
    ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
    kept: list[float] = [0.0] if low <= 0.0 <= high else []
    for tick in sorted(ticks, key=abs, reverse=True):
        near = any(abs(bend(tick) - bend(other)) < TICKS_APART * (high - low) for other in kept)
        if low <= bend(tick) <= high and not near:
            kept.append(tick)
    return tuple(sorted(kept))


def _decimals(tick: float) -> int:
    return next((places for places in range(6) if math.isclose(round(tick, places), tick, abs_tol=1e-12)), 6)


def _dot(point: Point, letter: str, scales: tuple[Scale, Scale], side: str) -> Dot:
    at_x, at_y = scales
    hint = f"{point.name}: {_in_words(point.x)} forgotten, {_in_words(point.y)} learned"
    return Dot(
        point.name,
        letter,
        at_x(point.x.value),
        min(at_y(point.y.value), PINNED),
        _whisker(point.x, at_x),
        _whisker(point.y, at_y) if at_y(point.y.value) <= PINNED else None,
        point.on_front,
        side,
        hint,
    )


def _in_words(spread: Spread) -> str:
    shown = number(spread.value, 4)
    if spread.low is None or spread.high is None:
        return shown
    return f"{shown} [{number(spread.low, 4)}, {number(spread.high, 4)}]"


def _whisker(spread: Spread, at: Scale) -> tuple[float, float] | None:
    if spread.low is None or spread.high is None:
        return None
    return at(spread.low), round(at(spread.high) - at(spread.low), 3)


def _front(dots: Sequence[Dot]) -> str:
    """Steps between the best trade-offs, left to right: what lies above them is beaten."""
    ordered = sorted(dots, key=lambda dot: (dot.x, -dot.y))
    path, last = [], None
    for dot in ordered:
        x, y = dot.x * UNITS / 100, (100 - dot.y) * UNITS / 100
        path.append(f"M{x:.1f} {y:.1f}" if last is None else f"H{x:.1f} V{y:.1f}")
        last = dot
    return " ".join(path) if len(path) > 1 else ""


Box = tuple[float, float, float, float]


def name_places(names: Sequence[str], spots: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    """For every dot the side its name stands on without lying on a dot or another name; "none" where there is none."""
    taken: list[Box] = [_around(x * WIDTH / 100, y * HEIGHT / 100) for x, y in spots]
    sides = []
    for index, (name, (x, y)) in enumerate(zip(names, spots, strict=True)):
        side = "none"
        for word, shift, rise in PLACES:
            box = _name_box(name, (x * WIDTH / 100, y * HEIGHT / 100), (word, shift, rise))
            others = [other for number, other in enumerate(taken) if number != index]
            if box[0] >= 0 and box[2] <= WIDTH and not any(_overlap(box, other) for other in others):
                side = word
                taken.append(box)
                break
        sides.append(side)
    return tuple(sides)


def _around(x: float, y: float) -> Box:
    return x - DOT, y - DOT, x + DOT, y + DOT


def _name_box(name: str, spot: tuple[float, float], place: tuple[str, float, float]) -> Box:
    word, shift, rise = place
    width = LETTER * len(name)
    aside = DOT if word == "right" else -DOT if word == "left" else 0.0
    left, bottom = spot[0] + aside + shift * width, spot[1] + rise * LINE
    return left, bottom, left + width, bottom + LINE


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
