"""The report of one stream: stages and domains in the words a reader needs, random weights never a reference."""

from __future__ import annotations

from typing import Any

import pytest

from mfext.report.extras import Extras, extras_of
from mfext.report.html import to_html
from mfext.report.report import Curves, HeatMap, Report, Section, Table
from mfext.report.sections import run_report
from mfext.report.since import changes_since_learned, learned_stages, starts_from_random
from tests.report.stream_results import LN2, NEVER, STREAM, stream_data, within_of
from tests.report.test_html import Page


def titled(report: Report) -> dict[str, Section]:
    return {section.title: section for section in report.sections}


@pytest.fixture
def data() -> dict[str, Any]:
    return stream_data("replay")


def test_many_learned_domains_make_one_headline_and_one_list(data: dict[str, Any]) -> None:
    lines = run_report("continual", data, Extras()).verdict
    assert lines[0].startswith("learned 4 domains: ")
    assert lines[1].startswith("one by one: english_prose 8.0")
    assert all(name in lines[1] for name in STREAM)


def test_a_domain_is_compared_with_the_stage_that_learned_it(data: dict[str, Any]) -> None:
    assert learned_stages(data) == {**{name: i + 1 for i, name in enumerate(STREAM)}, **dict.fromkeys(NEVER)}
    rows = data["matrix"]["nll_per_byte"]
    changed = changes_since_learned(data)
    assert changed[0][1] is None and changed[1][1] == 0.0
    assert changed[3][1] == pytest.approx((rows[4][1] - rows[2][1]) / LN2)


def test_random_weights_are_named_so_and_nothing_is_forgotten_against_them(data: dict[str, Any]) -> None:
    assert starts_from_random(data)
    parts = titled(run_report("continual", data, Extras()))
    assert "random weights" in parts["Loss after each stage"].note
    assert "Change from row 0" not in parts
    since = parts["Change since it was learned"]
    assert isinstance(since, HeatMap) and since.values[0][STREAM.index("english_prose")] == 0.0
    assert all(value is not None and abs(value) < 1 for value in since.values[-1])


def test_a_trained_base_keeps_its_row_0(data: dict[str, Any]) -> None:
    data["stages"][0] = {"index": 0, "name": "base", "method": "pretrain"}
    parts = titled(run_report("continual", data, Extras()))
    assert "untouched base" in parts["Loss after each stage"].note and "Change from row 0" in parts
    assert changes_since_learned(data)[0][4] != 0.0


def test_the_table_says_what_a_stage_brought_and_what_is_left_of_it(data: dict[str, Any]) -> None:
    table = titled(run_report("continual", data, Extras()))["Learned and kept"]
    assert isinstance(table, Table)
    row = dict(zip(table.columns, table.rows[1], strict=True))
    rows = data["matrix"]["nll_per_byte"]
    assert (row["domain"], row["learned in"]) == ("python_code", "stage 2")
    assert row["before"] == f"{rows[1][1] / LN2:.3f}" and row["after"] == f"{rows[2][1] / LN2:.3f}"
    assert row["in the end"] == f"{rows[4][1] / LN2:.3f}"
    assert row["forgotten"] == f"+{(rows[4][1] - rows[2][1]) / LN2:.3f}"
    assert dict(zip(table.columns, table.rows[-1], strict=True))["learned in"] == "never"


def test_what_the_data_says_about_learning_wins(data: dict[str, Any]) -> None:
    data["learned_in"] = {**learned_stages(data), "english_prose": 3}
    assert learned_stages(data)["english_prose"] == 3
    assert changes_since_learned(data)[1][0] is None


def test_evaluations_within_stages_become_curves_with_borders(data: dict[str, Any]) -> None:
    data |= {"within": within_of(data), "borders": [0, 0, 500, 1000]}
    curves = titled(run_report("continual", data, Extras()))["Loss within the stages"]
    assert isinstance(curves, Curves) and len(curves.series) == 7
    # A stage that took no step has no border of its own.
    assert curves.borders == ((0.0, "python_code"), (500.0, "german_prose"), (1000.0, "math_word_problems"))


def test_three_gates_are_one_picture(data: dict[str, Any], build_result: Any) -> None:
    gates = [{"gate": index, "share_open": 0.1 * index, "share_not_full": 0.95} for index in range(3)]
    details = {name: {"usage": None, "gates": gates} for name in STREAM}
    generations = [
        {"name": name, "mode": "gated", "attention_experts": [1], "feedforward_experts": [1]} for name in STREAM[1:]
    ]
    raw = {"details": {"last": details}, "generations": generations}
    gates_map = titled(run_report("continual", data, extras_of(data, raw)))["Gates"]
    assert isinstance(gates_map, HeatMap) and gates_map.columns == STREAM[1:]
    assert gates_map.values[0] == pytest.approx((0.0, 10.0, 20.0))


def test_the_page_of_a_stream_is_well_formed(data: dict[str, Any]) -> None:
    data |= {"within": within_of(data), "borders": [0, 500, 1000, 1500]}
    page = Page(to_html(run_report("continual", data, Extras())))
    # More lines than colours: the seventh is dashed.
    assert any("dashed" in (attributes.get("class") or "") for tag, attributes in page.tags if tag == "path")
