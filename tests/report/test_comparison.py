"""A sweep's report: the verdict in plain words, intervals kept, failed trials named, one well-formed page."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mfext.commands.sweep_summary import with_groups
from mfext.report.comparison import sweep_report
from mfext.report.groups import Estimate, as_fraction, ratio_headline, ratio_text
from mfext.report.html import to_html
from mfext.report.markdown import to_markdown
from mfext.report.report import CurvesGrid, HeatMaps, Point, Report, Scatter, Section, Spread, Table
from mfext.report.scatter import PINNED, bending, draw_scatter, highest_shown, name_places
from tests.report.stream_results import LN2, METHODS, NEVER, STREAM, fail, sweep_data, within_of
from tests.report.test_html import Page


def report_of(data: dict[str, Any]) -> Report:
    return sweep_report(with_groups(data))


def section_of(report: Report, title: str) -> Section:
    return next(section for section in report.sections if section.title == title)


def table_of(report: Report, title: str) -> Table:
    found = section_of(report, title)
    assert isinstance(found, Table)
    return found


def set_forgetting(data: dict[str, Any], bits: dict[str, float]) -> None:
    """Every seed of a method forgets the same."""
    for trial in data["trials"]:
        mean = trial["data"]["forgetting"]["mean"]
        mean["difference"] = bits[trial["overrides"]["method"]] * LN2


def test_the_verdict_says_who_forgets_how_much_against_whom() -> None:
    data = sweep_data(("full", "grow", "replay"))
    set_forgetting(data, {"grow": 0.006, "replay": 0.312, "full": 1.242})
    assert report_of(data).verdict[0] == "grow forgets 0.006 bits per byte, replay 0.31 (1/52), full 1.24 (1/207)"


def test_learning_is_held_against_full_on_the_worst_stage() -> None:
    data = sweep_data(("full", "grow"), seeds=(1,))
    for trial, factor in zip(data["trials"], (1.0, 1.021), strict=True):
        for place, name in enumerate(STREAM):
            trial["data"]["learned"][name]["after"] = 2.0 * (factor if place == 2 else 1.0)
    assert "grow learns within 2.1\u202f% of full on every stage" in "\n".join(report_of(data).verdict)
    data["trials"][1]["data"]["learned"]["german_prose"]["after"] = 1.9
    assert "grow learns at least as well as full on every stage" in "\n".join(report_of(data).verdict)


def test_one_seed_is_said_to_settle_nothing() -> None:
    report = report_of(sweep_data(("grow", "full"), seeds=(1,)))
    assert "one seed only, so no interval: grow, full" in report.verdict
    row = table_of(report, "Side by side").rows[0]
    assert "±" not in "".join(row)


def test_failed_and_waiting_trials_are_rows_with_their_reason() -> None:
    data = sweep_data(("grow", "full"))
    fail(data, 1, "not enough memory")
    data["trials"][5] |= {"state": "waiting", "data": None}
    report = report_of(data)
    assert "4 of 6 trials done: 1 failed, 1 waiting" in report.verdict
    missing = table_of(report, "Trials without a result").rows
    assert [(row[2], row[3]) for row in missing] == [
        ("failed", "not enough memory"),
        ("waiting", "not started or cut off"),
    ]
    assert [row[1] for row in table_of(report, "Side by side").rows] == ["2 of 3", "2 of 3"]


def test_a_sweep_without_a_result_still_is_a_report() -> None:
    data = sweep_data(("grow",), seeds=(1,))
    fail(data, 0, "diverged")
    report = report_of(data)
    assert report.verdict == ("0 of 1 trial done: 1 failed",)
    Page(to_html(report))


def test_a_broken_promise_in_one_trial_shouts() -> None:
    data = sweep_data(("grow", "full"))
    data["trials"][2]["data"]["frozen_ok"] = False
    assert report_of(data).alarms == (
        f"FROZEN PARTS CHANGED in 1 trial: {data['trials'][2]['run']}; do not use these models",
    )


def test_the_page_of_ten_methods_is_well_formed_and_whole() -> None:
    data = sweep_data()
    fail(data, 29, "diverged")
    report = report_of(data)
    text = to_html(report)
    page = Page(text)
    assert not {"script", "img", "link"} & {tag for tag, _ in page.tags}
    for title in ("Forgetting against learning", "Side by side", "Change since it was learned", "Cost", "Trials"):
        assert title in page.words
    assert to_markdown(report).count("\n## ") == len(report.sections)


def test_hostile_names_in_a_sweep_stay_text() -> None:
    evil = "<script>alert(1)</script>"
    data = sweep_data(("grow", "full"))
    for trial in data["trials"][:3]:
        trial["overrides"]["method"] = evil
    fail(data, 5, evil)
    page = Page(to_html(report_of(data)))
    assert "script" not in {tag for tag, _ in page.tags} and evil in page.words


def test_the_pareto_front_holds_what_nothing_beats() -> None:
    data = sweep_data(("grow", "full", "replay", "lora"))
    scatter = section_of(report_of(data), "Forgetting against learning")
    assert isinstance(scatter, Scatter) and scatter.linear_below is not None
    front = {point.name for point in scatter.points if point.on_front}
    for point in scatter.points:
        beaten = any(
            other.x.value <= point.x.value and other.y.value <= point.y.value and other != point
            for other in scatter.points
        )
        assert (point.name in front) is not beaten
    assert "lora" not in front and "grow" in front


def test_numbers_for_machines_are_in_bits_with_all_digits() -> None:
    data = sweep_data(("grow", "replay", "full"))
    numbers = table_of(report_of(data), "Side by side").numbers
    assert numbers is not None
    row = dict(zip(numbers.columns, numbers.rows[0], strict=True))
    wanted = [trial["data"]["forgetting"]["mean"]["difference"] / LN2 for trial in data["trials"][:3]]
    assert row["forgetting_bits_per_byte"] == pytest.approx(sum(wanted) / 3, rel=1e-12)
    low, high = row["forgetting_to_replay_low"], row["forgetting_to_replay_high"]
    ratio = row["forgetting_to_replay"]
    assert isinstance(low, float) and isinstance(high, float) and isinstance(ratio, float) and low < ratio < high


def test_every_setting_has_its_matrix_turned_so_that_a_phone_holds_it() -> None:
    maps = section_of(report_of(sweep_data(("grow", "full"))), "Change since it was learned")
    assert isinstance(maps, HeatMaps) and [each.title for each in maps.maps] == ["grow", "full"]
    first = maps.maps[0]
    assert first.columns == ("1", "2", "3", "4") and first.rows[:4] == STREAM
    assert first.values[1][0] is None and first.values[1][1] == 0.0
    assert maps.maps[0].full == maps.maps[1].full


def test_curves_begin_where_the_domain_was_learned() -> None:
    grid = section_of(report_of(sweep_data(("grow", "full"))), "Loss since it was learned")
    assert isinstance(grid, CurvesGrid)
    starts = {chart.title: {series.points[0][0] for series in chart.series} for chart in grid.charts}
    assert starts["english_prose"] == {1.0} and starts["german_prose"] == {3.0}
    assert starts["c_code"] == {1.0}  # Never trained: row 0 is random weights.
    assert "math_word_problems" not in starts


def test_curves_take_evaluations_within_stages_where_there_are_any() -> None:
    data = sweep_data(("grow", "full"), seeds=(1,))
    for trial in data["trials"]:
        trial["data"] |= {"within": within_of(trial["data"]), "borders": [0, 500, 1000, 1500]}
    grid = section_of(report_of(data), "Loss since it was learned")
    assert isinstance(grid, CurvesGrid)
    chart = next(chart for chart in grid.charts if chart.title == "python_code")
    assert chart.x_label == "step" and chart.series[0].points[0][0] == 1000.0
    assert [name for _, name in chart.borders] == ["german_prose", "math_word_problems"]


@pytest.mark.parametrize(
    ("ratio", "words"), [(0.0192, "1/52"), (0.4, "1/2.5"), (1.0, "1.00\u202f×"), (24.0, "24\u202f×"), (-0.1, "0")]
)
def test_ratios_read_as_people_say_them(ratio: float, words: str) -> None:
    assert as_fraction(ratio) == words


def test_a_ratio_keeps_its_interval() -> None:
    assert ratio_text(Estimate(1 / 52, 1 / 110, 1 / 30)) == "1/52 (1/110–1/30)"
    assert ratio_text(Estimate(1 / 52, None, None, "not testable: 1 seed")) == "1/52"


def test_a_bent_axis_keeps_order_sign_and_zero() -> None:
    bend = bending(0.01)
    values = [-1.0, -0.01, 0.0, 0.001, 0.01, 1.0]
    bent = [bend(value) for value in values]
    assert bent == sorted(bent) and bend(0.0) == 0.0 and bend(-1.0) == -bend(1.0)


def test_one_far_dot_is_pinned_to_the_edge_and_says_where_it_is() -> None:
    heights = {"a": 2.0, "b": 2.05, "c": 2.1, "far": 9.5}
    points = tuple(Point(name, Spread(0.1 * index), Spread(y)) for index, (name, y) in enumerate(heights.items()))
    assert highest_shown(list(heights.values())) == 2.1
    drawn = draw_scatter(Scatter("s", points=points))
    assert drawn.dots[3].y == PINNED and drawn.dots[3].name == "far ↑ 9.50"
    assert all(dot.y < PINNED for dot in drawn.dots[:3])


def test_names_never_lie_on_each_other() -> None:
    assert name_places(["alpha", "beta"], [(50, 50), (50.5, 50)]) != ("right", "right")
    assert name_places(["alpha"] * 12, [(50, 50)] * 12).count("none") >= 8
    assert name_places(["a very long name indeed"], [(99, 50)]) == ("left",)


def test_intervals_stay_inside_the_plot() -> None:
    report = report_of(sweep_data())
    scatter = section_of(report, "Forgetting against learning")
    assert isinstance(scatter, Scatter)
    for dot in draw_scatter(scatter).dots:
        for whisker in (dot.x_whisker, dot.y_whisker):
            assert whisker is None or (whisker[0] >= -1e-9 and whisker[0] + whisker[1] <= 100 + 1e-9)
        assert 0 <= dot.x <= 100 and 0 <= dot.y <= 100 and math.isfinite(dot.x)


def test_made_up_results_cover_every_method_of_the_comparison() -> None:
    assert len(METHODS) == 10 and set(NEVER).isdisjoint(STREAM)


def test_a_ratio_is_never_finer_than_its_interval() -> None:
    assert ratio_headline(Estimate(1 / 45_649, -1 / 3000, 1 / 2500)) == "under 1/2500"
    assert ratio_headline(Estimate(-0.001, None, None, "not testable: the denominator may be 0")) == "not testable"
    assert ratio_headline(Estimate(0.02, None, None, "not testable: 1 seed run by both")) == "1/50"
    assert ratio_text(Estimate(0.0, 0.0, 0.0)) == "0"


def test_forgetting_that_may_be_none_is_said_to_be_so() -> None:
    data = sweep_data(("grow", "full"))
    for trial, bits in zip(data["trials"], (-0.001, 0.0, 0.0012, 1.2, 1.25, 1.3), strict=True):
        trial["data"]["forgetting"]["mean"]["difference"] = bits * LN2
    first = report_of(data).verdict[0]
    assert first.startswith("grow forgets nothing measurable, 0.000 ± 0.003 bits per byte, full 1.25 (under 1/")


def test_the_verdict_on_learning_says_how_far_the_intervals_reach() -> None:
    data = sweep_data(("grow", "full"))
    worst = max(gap["high"] for gap in with_groups(data)["groups"][0]["learning_to"]["full"].values())
    assert f"the 95 % intervals reach +{100 * worst:.1f}" in "\n".join(report_of(data).verdict)
