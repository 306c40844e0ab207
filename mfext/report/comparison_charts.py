"""Pictures of a sweep: forgetting against learning, the loss through the stream, one small matrix per setting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mfext.report.curves import stage_borders
from mfext.report.groups import LN2, Estimate, Group
from mfext.report.quantities import bits
from mfext.report.reading import Json, as_number, domains, listed, mapping, matrix, stages
from mfext.report.report import Curves, CurvesGrid, HeatMap, HeatMaps, Point, Scatter, Series, Spread
from mfext.report.since import changes_since_learned, learned_stages, starts_from_random

# Beyond this ratio of the largest to the smallest forgetting a linear axis shows the small ones as one.
LINEAR_UP_TO = 20.0
# Forgetting below this many bits per byte is next to none: the axis is linear there.
LEAST = 0.001


def trade_off(groups: Sequence[Group]) -> Scatter:
    """The Pareto plot: mean forgetting against mean loss on what was learned, both better when lower."""
    known = [group for group in groups if None not in (group.forgetting.value, group.learned_mean.value)]
    missing = [group for group in groups if group not in known]
    places = [(_value(group.forgetting), _value(group.learned_mean)) for group in known]
    points = tuple(
        Point(group.name, _spread(group.forgetting), _spread(group.learned_mean), on_front=_is_best(place, places))
        for group, place in zip(known, places, strict=True)
    )
    return Scatter(
        "Forgetting against learning",
        points=points if len(points) > 1 else (),
        x_label="forgotten, bits per byte",
        y_label="loss on what was learned, bits per byte",
        linear_below=_bend([point.x.value for point in points]),
        missing=f"not shown, forgetting or learning is undefined: {_names(missing)}" if missing else "",
        note=(
            "Mean over seeds with 95 % intervals; the best corner is lower left. Filled dots are on the Pareto front: "
            "by its means no other setting both forgets less and learns better."
        ),
    )


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(f"{group.name} ({group.forgetting.reason or group.learned_mean.reason})" for group in groups)


def _value(of: Estimate) -> float:
    assert of.value is not None
    return of.value


def _spread(of: Estimate) -> Spread:
    shown = of.in_bits
    assert shown.value is not None
    return Spread(shown.value, shown.low, shown.high)


def _is_best(place: tuple[float, float], places: Sequence[tuple[float, float]]) -> bool:
    """Whether no other place is as low both ways and lower in one."""
    return not any(other[0] <= place[0] and other[1] <= place[1] and other != place for other in places)


def _bend(values: Sequence[float]) -> float | None:
    """Where a symmetric logarithmic axis becomes linear; None where a linear one shows all."""
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) / min(sizes) < LINEAR_UP_TO:
        return None
    return float(max(LEAST, 10.0 ** math.floor(math.log10(min(sizes)))))


def stream_curves(groups: Sequence[Group]) -> CurvesGrid:
    """Per domain its loss since the stage that learned it, one line per setting; within stages where measured there."""
    names = list(dict.fromkeys(name for group in groups for name in domains(group.data)))
    charts = tuple(chart for name in names if (chart := _stream_of(name, groups)).series)
    inside = any(mapping(group.data, "within") for group in groups)
    where = (
        "at every evaluation within the stages (the first seed's)" if inside else "after every stage (mean of seeds)"
    )
    return CurvesGrid(
        "Loss since it was learned",
        charts=charts if any(len(stages(group.data)) > 2 for group in groups) else (),
        note=f"Bits per byte on one domain, {where}, from the stage that learned it (never trained: from the first) to "
        "the last. Rising is forgetting.",
        in_terminal=False,
    )


def _stream_of(domain: str, groups: Sequence[Group]) -> Curves:
    inside = any(listed(group.data, "within", domain) for group in groups)
    series = [Series(group.name, points) for group in groups if (points := _since(group.data, domain, inside))]
    if not any(len(each.points) > 1 for each in series):
        return Curves(domain)
    named = next((group.data for group in groups if len(stages(group.data)) > 1), {})
    first = min(each.points[0][0] for each in series)
    known = stage_borders(named) if inside else [(float(at), name) for at, name in enumerate(stages(named)[1:])]
    borders = tuple((at, name) for at, name in known if at >= first)
    x_label = "step" if inside else "stage"
    return Curves(domain, series=tuple(series), borders=borders, x_label=x_label, y_label="bits per byte")


def _since(data: Json, domain: str, inside: bool) -> tuple[tuple[float, float], ...]:
    """The domain's line from the end of the stage that learned it; a bystander's from the first row that is trained."""
    stage = learned_stages(data).get(domain)
    stage = int(starts_from_random(data)) if stage is None else stage
    borders = [as_number(border) for border in listed(data, "borders")]
    start = float(stage)
    if inside:
        known = borders[stage] if stage < len(borders) else None
        start = math.inf if known is None else known
    return tuple(point for point in _points(data, domain, inside) if point[0] >= start)


def _points(data: Json, domain: str, inside: bool) -> tuple[tuple[float, float], ...]:
    if inside:
        pairs = [each for each in listed(data, "within", domain) if isinstance(each, list | tuple) and len(each) == 2]
        known = [(as_number(step), as_number(loss)) for step, loss in pairs]
        return tuple((step, loss / LN2) for step, loss in known if step is not None and loss is not None)
    if domain not in domains(data):
        return ()
    column = domains(data).index(domain)
    losses = [(float(stage), row[column]) for stage, row in enumerate(matrix(data))]
    return tuple((stage, loss / LN2) for stage, loss in losses if loss is not None)


def loss_maps(groups: Sequence[Group]) -> HeatMaps:
    """Every setting's matrix on one scale of colour."""
    values = {group.name: tuple(zip(*matrix(group.data), strict=True)) for group in groups}
    full = max((value for rows in values.values() for row in rows for value in row if value is not None), default=0.0)
    maps = tuple(
        HeatMap(
            group.name,
            rows=domains(group.data),
            columns=_stage_numbers(group.data),
            values=tuple(tuple(bits(value) for value in row) for row in values[group.name]),
            unit="bits per byte",
            digits=2,
            full=full / LN2 or None,
            missing="not measured",
        )
        for group in groups
        if matrix(group.data)
    )
    note = f"Bits per byte by domain and stage, mean over seeds. {_stage_key(groups)}"
    return HeatMaps("Loss after each stage", maps=maps, note=note, in_terminal=False)


def change_maps(groups: Sequence[Group]) -> HeatMaps:
    """Every setting's fingerprint: how each domain moved since it was learned."""
    changed = {group.name: changes_since_learned(group.data) for group in groups}
    sizes = [abs(value) for rows in changed.values() for row in rows for value in row if value is not None]
    full = max(sizes, default=0.0) or None
    maps = tuple(
        HeatMap(
            group.name,
            rows=domains(group.data),
            columns=_stage_numbers(group.data)[1:],
            values=tuple(zip(*changed[group.name], strict=True)),
            unit="bits per byte",
            digits=2,
            diverging=True,
            full=full,
            missing="not learned yet",
        )
        for group in groups
        if len(matrix(group.data)) > 1
    )
    never = "the first stage" if any(starts_from_random(group.data) for group in groups) else "row 0"
    note = (
        f"Bits per byte against the stage that learned the domain (never trained: against {never}). Above zero is "
        f"forgetting. {_stage_key(groups)}"
    )
    return HeatMaps("Change since it was learned", maps=maps, note=note, in_terminal=False)


def _stage_numbers(data: Json) -> tuple[str, ...]:
    return tuple(str(index) for index in range(len(matrix(data))))


def _stage_key(groups: Sequence[Group]) -> str:
    """Which number is which stage, where all settings went through the same ones."""
    orders = {stages(group.data) for group in groups}
    if len(orders) != 1:
        return "Columns are stages."
    return f"Stages: {', '.join(f'{index} {name}' for index, name in enumerate(orders.pop()))}."
