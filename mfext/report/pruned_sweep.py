"""The prunings of a sweep side by side: what is kept against what it costs, over seeds."""

from __future__ import annotations

from mfext.report.quantities import percent
from mfext.report.reading import Json, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import Curves, CurvesGrid, Numbers, Section, Series, Table


def pruning_sections(data: Json) -> tuple[Section, ...]:
    """Costs and curves of every setting that pruned; nothing for sweeps of other verbs."""
    groups = [group for group in objects(data, "groups") if mapping(group, "pruning")]
    return (_costs(groups), *(_table(group) for group in groups), _charts(groups)) if groups else ()


def _costs(groups: list[Json]) -> Table:
    rows = [
        (text(group, "name"), stage, *(_share(mapping(cost, key)) for key in ("against_whole", "against_full")))
        for group in groups
        for stage in mapping(group, "pruning", "costs")
        for cost in [mapping(group, "pruning", "costs", stage)]
    ]
    return Table(
        "What pruning cost",
        columns=("setting", "stage", "against the model pruned", "against full fine-tuning, unpruned"),
        rows=tuple(rows),
        text_columns=("setting", "stage"),
        note="Loss on the target after the stage, relative, with 95 % intervals over seeds. Lower is better.",
    )


def _share(interval: Json) -> str:
    middle, low, high = (number_at(interval, key) for key in ("estimate", "low", "high"))
    if middle is None:
        return ""
    spread = f" [{_signed(low)}, {_signed(high)}]" if low is not None and high is not None else ""
    return f"{_signed(middle)} %{spread}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _table(group: Json) -> Table:
    points = objects(group, "pruning", "curve")
    shares = sorted({keep for point in points if (keep := number_at(point, "keep")) is not None}, reverse=True)
    criteria = list(dict.fromkeys(text(point, "criterion") for point in points))
    found = {(text(point, "criterion"), number_at(point, "keep")): mapping(point, "rise") for point in points}
    rows = tuple((name, *(_share(found.get((name, keep), {})) for keep in shares)) for name in criteria)
    numbers = Numbers(
        ("criterion", "keep", "rise, share", "low", "high"),
        tuple(
            (name, keep, *(number_at(rise, key) for key in ("estimate", "low", "high")))
            for (name, keep), rise in found.items()
        ),
    )
    return Table(
        f"Rise on {text(group, 'pruning', 'target')} by share kept: {text(group, 'name')}",
        columns=("criterion", *(f"{percent(keep, 1)} kept" for keep in shares)),
        rows=rows,
        text_columns=("criterion",),
        numbers=numbers,
        note="Against the model that was pruned, before any healing; mean over seeds with its 95 % interval.",
    )


def _charts(groups: list[Json]) -> CurvesGrid:
    charts = []
    for group in groups:
        points = objects(group, "pruning", "curve")
        series = tuple(
            Series(name, tuple(sorted(_line(points, name))))
            for name in dict.fromkeys(text(each, "criterion") for each in points)
        )
        charts.append(
            Curves(
                text(group, "name"),
                series=tuple(each for each in series if each.points),
                x_label="% of experts kept",
                y_label="rise on the target, %",
            )
        )
    return CurvesGrid("Share kept against loss", charts=tuple(charts), in_terminal=False)


def _line(points: tuple[Json, ...], criterion: str) -> list[tuple[float, float]]:
    own = [point for point in points if text(point, "criterion") == criterion]
    pairs = [(number_at(point, "keep"), number_at(point, "rise", "estimate")) for point in own]
    known = [(100 * keep, 100 * rise) for keep, rise in pairs if keep is not None and rise is not None]
    return [(100.0, 0.0), *known] if known else []
