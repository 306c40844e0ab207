"""The page of a prune sweep: it opens with what was kept and lost on the target, by settings of short names."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from mfext.commands.sweep_summary import with_groups
from mfext.report.charts import draw_curves
from mfext.report.comparison import sweep_report
from mfext.report.html import to_html
from mfext.report.report import Cards, CurvesGrid, Report, Section, Table
from mfext.report.setting_names import setting_name, short_values
from tests.report.test_html import Page

THIN = "\u202f"
# Method -> loss on the target when fine-tuned, pruned and healed; share of it that the curve loses at half the experts.
LOSSES = {"full": (2.0, 2.04, 2.02), "concentrate": (2.02, 2.03, 2.004)}


def run_of(method: str, target: str, seed: int, kept: int = 16) -> dict[str, Any]:
    """The stable JSON of one pruning, as far as a sweep's page reads it."""
    tuned, pruned, healed = (loss * (1 + 0.001 * seed) for loss in LOSSES[method])
    points = [
        {"criterion": criterion, "keep": keep, "increase": {target: {"share": (rise + 0.01 * seed) * (1 - keep)}}}
        for criterion, rise in (("ablation", 0.02), ("random", 1.5))
        for keep in (0.75, 0.5)
    ]
    return {
        "method": method,
        "target": target,
        "criterion": "ablation",
        "kept": kept,
        "experts": 32,
        "params_before": 4_110_000,
        "params_after": 2_280_000,
        "domains": [target, "prose"],
        "stages": [{"name": name} for name in ("base", target, "pruned", "healed")],
        "matrix": {"nll_per_byte": [[3.0, 2.0], [tuned, 2.5], [pruned, 2.6], [healed, 2.7]]},
        "curve": [{"criterion": None, "keep": 1.0, "increase": {}}, *points],
        "learned": {target: {"before": 3.0, "after": tuned}},
        "forgetting": {"mean": {"difference": 0.7}, "domains": {"prose": {"difference": 0.7}}},
    }


def sweep_of(methods: tuple[str, ...], folders: tuple[str, ...], seeds: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    trials = []
    for number, (method, folder, seed) in enumerate(product(methods, folders, seeds)):
        overrides = {"method": method, "domain": folder, "seed": seed}
        done = {"id": f"trial{number}", "state": "done", "run": f"trials/trial{number}", "error": None}
        trials.append({**done, "overrides": overrides, "data": run_of(method, folder.rsplit("/", 1)[-1], seed)})
    axes = {"method": list(methods), "domain": list(folders), "seed": list(seeds)}
    return {"verb": "prune", "sweep": "runs/s", "report": "runs/s/report.html", "axes": axes, "trials": trials}


def report_of(*arguments: Any) -> Report:
    return sweep_report(with_groups(sweep_of(*arguments)))


def section_of(report: Report, title: str) -> Section:
    return next(section for section in report.sections if section.title == title)


BOTH, FOLDERS = ("full", "concentrate"), ("../corpora/python_code", "../corpora/german_prose")


def test_the_page_opens_with_what_was_kept_and_what_that_cost_on_each_target() -> None:
    report = report_of(BOTH, FOLDERS)
    first = report.verdict[0]
    assert first.startswith(f"on python_code concentrate keeps 50{THIN}% of the experts, loss +0.2{THIN}% [")
    assert "against unpruned full fine-tuning" in first and f"full +1.0{THIN}%" in first
    assert report.verdict[1].startswith(f"on python_code as many experts drawn by lot cost +75.8{THIN}% [")
    assert report.verdict[2].startswith("on german_prose")
    assert not any("forgets" in line for line in report.verdict)
    titles = [section.title for section in report.sections]
    assert titles[:3] == ["Key numbers", "Share kept against loss", "What pruning cost"]
    cards = section_of(report, "Key numbers")
    assert isinstance(cards, Cards) and cards.cards[0].value == f"+0.2{THIN}%"
    shown = [section.title for section in report.sections if section.in_terminal]
    assert "Side by side" not in shown and "Forgetting against learning" not in shown


def test_the_curves_are_by_setting_with_an_interval_at_every_share_that_has_one() -> None:
    grid = section_of(report_of(BOTH, FOLDERS), "Share kept against loss")
    assert isinstance(grid, CurvesGrid) and [chart.title for chart in grid.charts] == ["python_code", "german_prose"]
    chart = grid.charts[0]
    assert [each.name for each in chart.series] == ["full", "concentrate", "drawn by lot"]
    assert [x for x, _ in chart.series[0].points] == [50.0, 75.0, 100.0]
    for x, low, high in chart.series[0].intervals:
        assert low < dict(chart.series[0].points)[x] < high
    assert [x for x, _, _ in chart.series[0].intervals] == [50.0, 75.0]
    for line in draw_curves(chart).lines:
        assert all(bottom >= 0 and height >= 0 and bottom + height <= 100.001 for _, bottom, height in line.whiskers)
    one = section_of(report_of(BOTH, FOLDERS, (1,)), "Share kept against loss")
    assert isinstance(one, CurvesGrid) and one.charts[0].series[0].intervals == ()


def test_costs_are_told_against_the_model_pruned_where_nobody_fine_tuned_as_usual() -> None:
    report = report_of(("concentrate",), FOLDERS[:1], (1,))
    assert "against the model pruned" in report.verdict[0] and "one seed only" in report.verdict[-1]
    table = section_of(report, "What pruning cost")
    assert isinstance(table, Table)
    assert [row[:3] for row in table.rows] == [
        ("concentrate", "python_code", "pruned"),
        ("concentrate", "python_code", "healed"),
    ]
    assert "One seed has no interval" in table.note


def test_no_name_on_the_page_is_a_path_but_where_things_are() -> None:
    report = report_of(BOTH, FOLDERS)
    page = to_html(report)
    Page(page)
    assert page.count("../corpora/python_code") == 1
    assert [group["name"] for group in report.data["groups"]][:2] == [
        "full domain=python_code",
        "full domain=german_prose",
    ]


@pytest.mark.parametrize(
    ("values", "short"),
    [
        (("../corpora/python_code", "prose"), ["python_code", "prose"]),
        (("a/code/raw", "b/code/raw"), ["a/code/raw", "b/code/raw"]),
        (("x/a/raw", "x/b/raw"), ["a/raw", "b/raw"]),
        (("hf:owner/name", 0.5), ["hf:owner/name", "0.5"]),
        (("/data/code",), ["code"]),
        (("code", "/data/code"), ["code", "data/code"]),
        (("data/code/", "other"), ["code", "other"]),
    ],
)
def test_values_are_shortened_only_as_far_as_they_stay_apart(values: tuple[object, ...], short: list[str]) -> None:
    overrides = [{"domain": value, "seed": 1} for value in values]
    shorts = short_values(overrides)
    assert [setting_name(each, shorts) for each in overrides] == [f"domain={text}" for text in short]
