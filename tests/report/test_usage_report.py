"""What the report of inspect shows of expert usage."""

from __future__ import annotations

import io
from typing import Any

import pytest

from mfext.report.anatomy import inspection_report
from mfext.report.html import to_html
from mfext.report.report import HeatMap, HeatMaps, Report, Section, Shares, Table
from mfext.report.terminal import render
from tests.report.test_html import Page


def bank(layer: int, share: list[float], generation: int = 0, tokens: int = 100) -> dict[str, Any]:
    return {
        "layer": layer,
        "kind": "feedforward",
        "generation": generation,
        "tokens": tokens,
        "share": share,
        "gate_mass": share,
        "contribution": [2 * each for each in share],
        "entropy_nats": 0.0,
        "dead_experts": sum(each < 0.1 / len(share) for each in share),
        "hot_experts": sum(each > 2 / len(share) for each in share),
    }


def report_of(banks: list[dict[str, Any]], *generations: dict[str, Any], domains: tuple[str, ...] = ("a",)) -> Report:
    usage = {"tokens": 100, "banks": banks, "sites": [{"layer": 0, "kind": "feedforward", "share_new": 0.5}]}
    square = [[1.0 if row == column else None for column in domains] for row in domains]
    return inspection_report(
        {
            "model": "m",
            "generations": list(generations),
            "usage": dict.fromkeys(domains, usage),
            "overlap": {"domains": list(domains), "cosine": square, "divergence_nats": square},
        }
    )


def titled(report: Report) -> dict[str, Section]:
    return {section.title: section for section in report.sections}


CODE = {"name": "code", "mode": "gated", "attention_experts": [0, 0], "feedforward_experts": [2, 1]}


def test_a_gated_generation_stands_beside_the_base_with_the_share_let_through() -> None:
    banks = [bank(0, [0.5, 0.5]), bank(1, [1.0, 0.0]), bank(0, [0.75, 0.25], 1, 50), bank(1, [1.0], 1, 50)]
    usage, balance = (titled(report_of(banks, CODE))[title] for title in ("Expert usage", "Balance"))
    assert isinstance(usage, HeatMaps) and isinstance(balance, Table)
    (shown,) = usage.maps
    assert shown.groups == (("base", 2), ("code", 2)) and shown.rows == ("layer 0", "layer 1")
    assert shown.values == ((50.0, 50.0, 37.5, 12.5), (100.0, 0.0, 50.0, None))
    assert [row[2:4] for row in balance.rows] == [("base", "100\u202f%"), ("code", "50\u202f%")]


def test_competing_experts_are_named_apart_in_the_bases_bank_where_layers_differ() -> None:
    code = {**CODE, "mode": "compete"}
    banks = [bank(0, [0.25, 0.25, 0.25, 0.25]), bank(1, [0.5, 0.25, 0.25])]
    usage = titled(report_of(banks, code))["Expert usage"]
    assert isinstance(usage, HeatMaps) and usage.maps[0].groups == (("base", 2), ("code", 2))
    assert usage.maps[0].values[1] == (50.0, 25.0, 25.0, None)


def test_contribution_is_a_share_of_the_layers_sum_over_all_routers() -> None:
    contribution = titled(report_of([bank(0, [0.5, 0.5]), bank(0, [1.0, 0.0], 1, 50)], CODE))["Contribution"]
    assert isinstance(contribution, HeatMaps)
    assert contribution.maps[0].values[0] == pytest.approx((100 / 3, 100 / 3, 100 / 3, 0.0))


def test_a_closed_generation_has_no_entropy_and_no_dead_experts() -> None:
    report = report_of([bank(0, [0.9, 0.1, 0.0]), bank(0, [0.0, 0.0], 1, 0)], CODE)
    balance = titled(report)["Balance"]
    assert isinstance(balance, Table)
    assert [row[4:] for row in balance.rows] == [("0\u202f%", "1 of 3", "1 of 3"), ("—", "—", "—")]
    assert "1 of 3 experts dead, 1 hot" in report.verdict[1]


def test_overlap_needs_two_domains_and_says_why_a_pair_has_none() -> None:
    one, two = report_of([bank(0, [1.0])]), report_of([bank(0, [1.0])], domains=("a", "b"))
    assert "Overlap of domains" not in titled(one)
    overlap = titled(two)["Overlap of domains"]
    assert isinstance(overlap, HeatMap) and overlap.values[0] == (1.0, None) and "no layer" in overlap.missing


def test_a_terminal_shows_usage_and_the_page_everything_else_too() -> None:
    report = report_of([bank(0, [0.5, 0.5])], CODE, domains=("<b>prose</b>", "code"))
    stream = io.StringIO()
    render(report, stream)
    text, page = stream.getvalue(), Page(to_html(report))
    assert "Balance" in text and "SHA-256" not in text and "Contribution" not in text
    assert "SHA-256" in page.words and "Contribution" in page.words and "<b>prose</b>" in page.words
    assert isinstance(titled(report)["Routing to old and new experts"], Shares)


def test_without_usage_nothing_is_added() -> None:
    report = inspection_report({"model": "m", "generations": [CODE]})
    assert [section.title for section in report.sections] == ["Model", "Generations", "Parameters by part"]
    assert all(section.in_terminal for section in report.sections) and len(report.verdict) == 1
