"""Every section as tables of finished text, for media without pictures."""

from __future__ import annotations

from mfext.report.quantities import NONE, count, interval, number, percent, signed
from mfext.report.report import (
    Bars,
    Cards,
    Curves,
    CurvesGrid,
    HeatMap,
    HeatMaps,
    KeyValues,
    Scatter,
    Section,
    Shares,
    Spread,
    Table,
)

# Points of a curve that a table shows.
CURVE_ROWS = 12


def as_tables(section: Section) -> tuple[Table, ...]:
    """The tables that say what `section` says; empty for plain text."""
    match section:
        case Table():
            return (section,)
        case KeyValues():
            return (_table(section, ("", " "), section.pairs, ("", " ")),)
        case Cards():
            rows = [(card.label, f"{card.value} {card.unit}".strip(), card.detail) for card in section.cards]
            return (_table(section, ("", "value", " "), tuple(rows), ("", "value", " ")),)
        case HeatMap():
            return (_heat_table(section),)
        case HeatMaps():
            return tuple(_heat_table(each) for each in section.maps)
        case Bars():
            return (_bars_table(section),)
        case Shares():
            return (_shares_table(section),)
        case Curves():
            return _curve_tables(section)
        case CurvesGrid():
            return tuple(_ends_table(chart) for chart in section.charts)
        case Scatter():
            return (_scatter_table(section),)
    return ()


def _table(
    section: Section, columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], text_columns: tuple[str, ...]
) -> Table:
    return Table(section.title, columns, rows, text_columns, note=section.note)


def _heat_table(section: HeatMap) -> Table:
    show = signed if section.diverging else number
    group_of = [name for name, size in section.groups for _ in range(size)] or [""] * len(section.columns)
    numbered = all(column.isdigit() for column in section.columns)
    named = [
        f"{group} {name}" if group and numbered else name for group, name in zip(group_of, section.columns, strict=True)
    ]
    unit = f" ({section.unit})" if section.unit else ""
    first = f"{section.title}{unit}" if numbered else unit.strip(" ()")
    rows = tuple(
        (name, *(show(value, section.digits) for value in values))
        for name, values in zip(section.rows, section.values, strict=True)
    )
    missing = any(value is None for values in section.values for value in values)
    why = f" {NONE}: {section.missing}." if missing and section.missing else ""
    return Table(section.title, (first, *named), rows, (first,), note=f"{section.note}{why}".strip())


def _bars_table(section: Bars) -> Table:
    remarks = any(bar.reason for bar in section.bars)
    rows = []
    for bar in section.bars:
        cells = (bar.name, bar.label, signed(bar.value, section.digits), _interval(section, bar.low, bar.high))
        rows.append((*cells, bar.reason) if remarks else cells)
    columns = ("domain", "role", section.unit, "95 % interval", *(["remark"] if remarks else []))
    return _table(section, columns, tuple(rows), ("domain", "role", "95 % interval", "remark"))


def _interval(section: Bars, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return NONE
    return f"[{signed(low, section.digits)}, {signed(high, section.digits)}]"


def bar_text(section: Bars, index: int) -> str:
    """A bar's value and interval in words."""
    bar = section.bars[index]
    if bar.value is None:
        return NONE
    text = interval(bar.value, bar.low, bar.high, section.digits)
    return f"+{text}" if bar.value > 0 else text


def _shares_table(section: Shares) -> Table:
    details = any(row.detail for row in section.rows)
    columns = ("domain", *section.parts, *([section.detail_name] if details else []))
    rows = tuple(
        (row.name, *(percent(share, 1) for share in row.shares), *([row.detail] if details else []))
        for row in section.rows
    )
    return _table(section, columns, rows, ("domain", section.detail_name))


def _curve_tables(section: Curves) -> tuple[Table, ...]:
    tables = []
    for series in section.series:
        last = len(series.points) - 1
        step = max(1, -(-last // (CURVE_ROWS - 1)))
        picked = sorted({*range(0, last + 1, step), last})
        rows = tuple(
            (count(series.points[index][0]), number(series.points[index][1], section.digits)) for index in picked
        )
        tables.append(Table(section.title, (section.x_label, f"{series.name} ({section.y_label})"), rows, ()))
    return tuple(tables)


def _ends_table(chart: Curves) -> Table:
    """Where every line of one chart begins, its lowest point, and where it ends."""
    rows = []
    for series in chart.series:
        values = [y for _, y in series.points]
        rows.append((series.name, *(number(value, chart.digits) for value in (values[0], min(values), values[-1]))))
    columns = (f"{chart.title} ({chart.y_label})", "first", "lowest", "last")
    return Table(chart.title, columns, tuple(rows), columns[:1])


def _scatter_table(section: Scatter) -> Table:
    rows = tuple(
        (point.name, _spread(point.x), _spread(point.y), "yes" if point.on_front else "") for point in section.points
    )
    columns = ("setting", section.x_label, section.y_label, "on the Pareto front")
    note = f"{section.note} {section.missing}".strip()
    return Table(section.title, columns, rows, ("setting", "on the Pareto front"), note=note)


def _spread(spread: Spread) -> str:
    return interval(spread.value, spread.low, spread.high, 4)
