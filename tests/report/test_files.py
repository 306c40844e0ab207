"""JSON, Markdown and the words for numbers."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from mfext.report.as_json import to_json
from mfext.report.charts import draw_bars, heat_cells, nice_ticks
from mfext.report.experts import Newcomers, expert_sections
from mfext.report.extras import extras_of
from mfext.report.markdown import to_markdown
from mfext.report.quantities import (
    brief,
    change_percent,
    count,
    duration,
    interval,
    number,
    percent,
    signed,
    size,
)
from mfext.report.report import Bar, Bars, HeatMap, HeatMaps, Report, Shares, Table
from mfext.report.sections import growth_sections, run_report


def test_json_is_one_object_that_comes_back_equal(build_result: Any) -> None:
    data = build_result(learned=2).data
    text = to_json(run_report("grow", data, extras_of(data, {})))
    assert "\n" not in text and json.loads(text) == data


def test_json_holds_no_number_that_json_has_not() -> None:
    data = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf,)], "c": {"d": True, "e": None}, "f": "\udc80"}
    text = to_json(Report("x", data, "x"))
    assert json.loads(text) == {"a": None, "b": [None, 1.5, [None]], "c": {"d": True, "e": None}, "f": "?"}


def test_json_refuses_what_it_cannot_say() -> None:
    with pytest.raises(AssertionError, match="set is no JSON"):
        to_json(Report("x", {"a": {1}}, "x"))


def test_markdown_has_the_same_sections_and_rectangular_tables(build_result: Any) -> None:
    result = build_result(learned=2)
    report = run_report("grow", result.data, extras_of(result.data, result.raw))
    text = to_markdown(report)
    titles = [section.title for section in report.sections]
    assert re.findall(r"^## (.*)$", text, re.M) == titles
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "- learned python_code: 3.10 → 1.55 bits per byte" in text


def test_markdown_escapes_names_and_shouts_alarms() -> None:
    table = Table("a|b", columns=("x",), rows=(("<script>|*\n# y",),), text_columns=("x",))
    text = to_markdown(Report("x", {}, "t", ("*v*",), (table,), ("BROKEN",)))
    assert "> **BROKEN**" in text and "\\<script\\>\\|\\* \\# y" in text and "- \\*v\\*" in text


def test_losses_are_shown_in_bits(build_result: Any) -> None:
    result = build_result()
    sections = {section.title: section for section in growth_sections(result.data, extras_of(result.data, result.raw))}
    losses, changes = sections["Loss after each stage"], sections["Change from row 0"]
    assert isinstance(losses, HeatMap) and isinstance(changes, HeatMap)
    assert losses.values[0][0] == pytest.approx(2.31) and changes.values[0][0] == pytest.approx(0.004)
    assert losses.groups == (("old", 3), ("learned", 1), ("bystander", 2))
    outcome = sections["Before and after"]
    assert isinstance(outcome, Table)
    assert outcome.rows[0][:5] == ("english_prose", "old", "2.310", "2.314", "+0.0040")


def test_competing_experts_stand_behind_the_bases_in_one_bank(build_result: Any) -> None:
    result = build_result(mode="compete")
    extras = extras_of(result.data, result.raw)
    usage, shares = expert_sections(extras.details, extras.newcomers)
    assert isinstance(usage, HeatMaps) and isinstance(shares, Shares)
    assert usage.maps[0].groups == (("base", 6), ("python_code", 4))
    assert shares.rows[0].shares == pytest.approx((0.1, 0.9))


def test_a_gated_bank_counts_only_the_tokens_let_through() -> None:
    bank = {"layer": 0, "kind": "attention", "generation": 1, "tokens": 10, "share": [0.5, 0.5]}
    base = {**bank, "generation": 0, "tokens": 100, "share": [1.0]}
    usage = {"tokens": 100, "banks": [base, bank], "sites": []}
    newcomers = (Newcomers("code", "gated", (2,), (0,)),)
    (first, _) = expert_sections({"prose": {"usage": usage}}, newcomers)
    assert isinstance(first, HeatMaps) and first.maps[0].values == ((100.0, 5.0, 5.0),)


def test_cells_take_their_colour_from_size_and_side() -> None:
    section = HeatMap("h", rows=("r",), columns=("a", "b", "c"), values=((-2.0, 1.0, None),), diverging=True)
    better, worse, none = heat_cells(section)[0]
    assert (better.strength, better.side, better.depth) == (1.0, "better", "strong")
    assert (worse.strength, worse.side, worse.text) == (0.5, "worse", "+1.000")
    assert (none.text, none.side) == ("—", "none")


def test_bars_and_whiskers_lie_inside_the_track() -> None:
    drawn = draw_bars(Bars("b", bars=(Bar("x", 0.4, 0.1, 0.9), Bar("y", -0.2), Bar("z", None, reason="why"))))
    for bar in drawn.bars:
        assert 0 <= bar.left <= bar.left + bar.width <= 100
    first = drawn.bars[0]
    assert first.whisker_left is not None and 0 < first.whisker_left < first.whisker_left + first.whisker_width < 100
    assert drawn.bars[2].text == "—" and drawn.bars[2].reason == "why"
    assert 0 < drawn.zero < 100


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 7.9, 5) == (0.0, 2.0, 4.0, 6.0)
    assert nice_ticks(1.0, 1.0, 5) == (1.0,)
    assert nice_ticks(-0.003, 0.011, 4) == (0.0, 0.005, 0.01)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(-0.0004), "0.000"),
        (number(None), "—"),
        (number(-1.5, 1), "−1.5"),
        (signed(0.004), "+0.004"),
        (signed(-0.0001), "0.000"),
        (interval(0.004, 0.002, 0.006), "0.004 ± 0.002"),
        (interval(0.4, 0.1, 0.45), "0.400 [0.100, 0.450]"),
        (interval(0.4, None, None), "0.400"),
        (percent(0.0002), "<0.1\u202f%"),
        (percent(0.0), "0\u202f%"),
        (percent(0.97), "97\u202f%"),
        (change_percent(3.1, 1.62), "−48\u202f%"),
        (change_percent(0.0, 1.0), ""),
        (count(9_999), "9\u202f999"),
        (count(1_234_567), "1.23\u202fM"),
        (count(999_999), "1.00\u202fM"),
        (brief(2_000_000), "2\u202fM"),
        (brief(500), "500"),
        (size(262_144), "262\u202fkB"),
        (size(12), "12\u202fB"),
        (duration(231.4), "3\u202fmin 51\u202fs"),
        (duration(7_500), "2\u202fh 05\u202fmin"),
        (duration(0.42), "0.4\u202fs"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected
