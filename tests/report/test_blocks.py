"""Heat maps in a terminal: as narrow as asked, and every number in its column."""

from __future__ import annotations

import io

import pytest

from mfext.report.blocks import heat_block
from mfext.report.report import HeatMap, HeatMaps, Report
from mfext.report.terminal import render


def heat(layers: int, *groups: tuple[str, int], value: float = 3.0) -> HeatMap:
    columns = tuple(str(number) for _, size in groups for number in range(size))
    values = tuple(tuple(value for _ in columns) for _ in range(layers))
    rows = tuple(f"layer {layer}" for layer in range(layers))
    return HeatMap("h", rows=rows, columns=columns, values=values, unit="%", digits=0, groups=groups, full=10.0)


def lines(section: HeatMap, width: int) -> list[str]:
    return [line.plain for line in heat_block(section, width)]


@pytest.mark.parametrize("groups", [(("base", 32),), (("base", 32), ("code", 4)), (("base", 64),), (("base", 200),)])
def test_48_layers_fit_into_80_columns_whatever_the_number_of_experts(groups: tuple[tuple[str, int], ...]) -> None:
    shown = lines(heat(48, *groups), 80)
    assert max(map(len, shown)) <= 80
    assert sum(line.count("3") for line in shown if line.strip() and "base" not in line) >= 48 * groups[0][1]


def test_32_experts_are_apart_from_one_another() -> None:
    assert lines(heat(48, ("base", 32)), 80)[-1].split() == ["47", *["3"] * 32]


def test_the_number_over_a_cell_is_its_columns() -> None:
    for width in (60, 80, 200):
        section = heat(1, ("base", 12), ("code", 11))
        values = tuple(7.0 if name == "10" else 0.0 for name in section.columns)
        block = lines(HeatMap("h", ("layer 0",), section.columns, (values,), digits=0, groups=section.groups), width)
        assert [block[1][place - 1 : place + 1] for place, sign in enumerate(block[2]) if sign == "7"] == ["10", "10"]


def test_a_zero_a_small_share_and_a_missing_expert_look_different() -> None:
    section = HeatMap("h", ("a",), ("0", "1", "2"), ((0.0, 0.2, None),), digits=0)
    assert lines(section, 80)[-1].split() == ["a", "·", "0"]


def test_narrow_cells_say_ten_or_more_and_wide_ones_the_number() -> None:
    section = heat(1, ("base", 32), value=12.0)
    assert lines(section, 80)[-1].split()[1:] == ["+"] * 32
    assert lines(section, 400)[-1].split()[1:] == ["12"] * 32


def test_values_of_a_third_of_the_scale_and_more_differ_in_colour() -> None:
    section = HeatMap("h", ("a",), ("0", "1", "2"), ((2.0, 5.0, 50.0),), digits=0, full=9.0)
    styles = [str(span.style) for span in heat_block(section, 80)[-1].spans if "rgb" in str(span.style)]
    assert len(set(styles)) == 3 and styles[-1].endswith("rgb(253,231,55)") and styles[-1].startswith("black")


def test_a_name_steers_no_terminal() -> None:
    section = HeatMap("\x1b[2J", ("\x1b[31m r",), ("\x1b",), ((1.0,),), digits=0, groups=(("\x1b]0;t\x07", 1),))
    stream = io.StringIO()
    render(Report("x", {}, "x", sections=(HeatMaps("m", maps=(section,)),)), stream)
    assert "\x1b" not in stream.getvalue() and "\x07" not in stream.getvalue()


def test_maps_of_fractions_stay_tables() -> None:
    section = HeatMap("h", ("r",), ("c",), ((0.125,),), digits=3)
    stream = io.StringIO()
    render(Report("x", {}, "x", sections=(HeatMaps("m", maps=(section,)),)), stream)
    assert "0.125" in stream.getvalue()
