"""Two runs compared document by document, and runs held to budgets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mfext.cli import main
from mfext.commands import check, compare, grow, report
from mfext.commands.check import check_all
from mfext.errors import BudgetError, InputError
from mfext.report.report import Report
from mfext.requests import CheckRequest, CompareRequest, ReportRequest
from mfext.store import Run
from tests.commands.tiny_world import QUIET, World
from tests.report.stream_results import LN2, stream_data


@pytest.fixture(scope="module")
def full(world: World, grown: Report) -> Report:
    """Full fine-tuning on the same base, domain and budget."""
    return grow.run(world.recipe("compared-full", "method=full"), QUIET)


def run_of(made: Report) -> str:
    return str(made.data["run"])


def compared(a: Report, b: Report) -> dict[str, Any]:
    return dict(compare.run(CompareRequest(run_a=run_of(a), run_b=run_of(b)), QUIET).data)


def test_a_comparison_is_paired_on_every_common_domain(grown: Report, full: Report) -> None:
    data = compared(grown, full)
    assert set(data["domains"]) == {"letters", "digits"}
    last_a, last_b = (made.data["matrix"]["nll_per_byte"][-1] for made in (grown, full))
    entry = data["domains"]["letters"]
    assert {"a", "b", "difference", "low", "high"} <= entry.keys()
    assert (entry["a"], entry["b"]) == (last_a[0], last_b[0])
    assert entry["difference"] == pytest.approx(entry["b"] - entry["a"], rel=1e-9)
    assert entry["low"] < entry["difference"] < entry["high"]


def test_turning_a_comparison_round_turns_its_sign(grown: Report, full: Report) -> None:
    there, back = (compared(*pair)["domains"]["digits"] for pair in ((grown, full), (full, grown)))
    assert there["difference"] == -back["difference"]
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))


def test_a_run_equals_itself(grown: Report) -> None:
    made = compare.run(CompareRequest(run_a=run_of(grown), run_b=run_of(grown)), QUIET)
    assert made.verdict[0].startswith("a and b are equally good")


def test_a_comparison_can_be_a_page(grown: Report, full: Report, tmp_path: Path) -> None:
    page = tmp_path / "ab.html"
    assert main(["compare", run_of(grown), run_of(full), "--out", str(page)]) == 0
    assert "Difference" in page.read_text() and "sweep over seeds" in page.read_text()


def test_runs_measured_on_other_documents_are_refused_in_one_line(
    world: World, grown: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = grow.run(world.recipe("compared-short", "evaluation.max_bytes=2000", "training.tokens=2048"), QUIET)
    capsys.readouterr()
    assert main(["compare", run_of(grown), run_of(shorter)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "different documents" in error


@pytest.mark.parametrize("words", [["compare"], ["compare", "a"], ["compare", "nowhere", "nowhere"], ["check", "no"]])
def test_what_is_no_run_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("mfext: error: ")


def test_a_run_within_its_budgets_passes(grown: Report, capsys: pytest.CaptureFixture[str]) -> None:
    budgets = ["--max-forgetting", "0.1", "--min-learned", "0.3"]
    assert main(["check", run_of(grown), *budgets, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is True and data["failed"] == []
    assert {each["name"] for each in data["checks"]} == {
        *("max_forgetting", "min_learned", "finished", "frozen_ok", "detach_equals_base")
    }


def test_a_broken_budget_shows_the_report_and_ends_with_5(grown: Report, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", run_of(grown), "--max-forgetting", "-5", "--json"]) == 5
    out, error = capsys.readouterr()
    data = json.loads(out)
    assert data["passed"] is False and data["failed"] == ["max_forgetting"]
    assert error.startswith("mfext: error: over budget: ") and "max_forgetting" in error and error.count("\n") == 1


def test_budgets_are_in_bits(grown: Report) -> None:
    mean = grown.data["forgetting"]["mean"]["difference"] / LN2
    for limit, passed in ((mean + 1e-9, True), (mean - 1e-9, False)):
        made = check.run(CheckRequest(run=run_of(grown), max_forgetting=limit), QUIET)
        assert made.data["passed"] is passed
        assert (made.failure is None) is passed
    assert isinstance(made.failure, BudgetError)


def test_changed_frozen_parts_fail_without_any_budget() -> None:
    assert all(each.passed for each in check_all(stream_data(), CheckRequest(run="r")))
    data = stream_data()
    data["frozen_ok"] = False
    assert [each.name for each in check_all(data, CheckRequest(run="r")) if not each.passed] == ["frozen_ok"]


def test_an_unfinished_run_fails() -> None:
    data = {**stream_data(), "finished": False}
    assert [each.name for each in check_all(data, CheckRequest(run="r")) if not each.passed] == ["finished"]


def test_the_worst_domain_is_held_to_the_budget_of_learning_and_of_bystanders() -> None:
    data = stream_data("replay")
    data["learned"]["python_code"] |= {"difference": -0.1 * LN2, "low": -0.2 * LN2, "high": 0.05 * LN2}
    data["bystanders"]["domains"]["c_code"] |= {"difference": 0.7 * LN2, "low": 0.6 * LN2, "high": 0.9 * LN2}
    request = CheckRequest(run="r", min_learned=0.2, max_bystander=0.65)
    learned, never = check_all(data, request)[:2]
    assert not learned.passed and learned.domain == "python_code" and learned.value == pytest.approx(0.1)
    assert not never.passed and never.domain == "c_code" and never.value == pytest.approx(0.7)


def test_strict_takes_the_bad_end_of_the_interval() -> None:
    data = stream_data("grow")
    data["forgetting"]["mean"] = {"difference": 0.01 * LN2, "low": -0.01 * LN2, "high": 0.03 * LN2}
    data["learned"] = {"python_code": {"difference": -1.0 * LN2, "low": -1.2 * LN2, "high": -0.8 * LN2}}
    lenient = check_all(data, CheckRequest(run="r", max_forgetting=0.02, min_learned=0.9))
    strict = check_all(data, CheckRequest(run="r", max_forgetting=0.02, min_learned=0.9, strict=True))
    assert [each.passed for each in lenient[:2]] == [True, True]
    assert [(each.passed, each.value) for each in strict[:2]] == [
        (False, pytest.approx(0.03)),
        (False, pytest.approx(0.8)),
    ]


def test_what_is_not_known_fails_with_the_reason() -> None:
    data = stream_data("grow")
    data["forgetting"]["mean"] = {"difference": None, "low": None, "high": None, "reason": "no domain to compare"}
    data["bystanders"] = {"domains": {}}
    request = CheckRequest(run="r", max_forgetting=1.0, max_bystander=1.0)
    forgotten, never = check_all(data, request)[:2]
    assert not forgotten.passed and forgotten.reason == "no domain to compare"
    assert not never.passed and never.reason == "no such domain was measured"


def test_a_budget_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="max_forgetting=nan: must be a finite number"):
        CheckRequest(run="r", max_forgetting=math.nan)


@pytest.mark.parametrize(("form", "ending"), [("csv", ".csv"), ("latex", ".tex")])
def test_a_report_writes_its_tables_into_the_run(grown: Report, form: str, ending: str) -> None:
    made = report.run(ReportRequest(run=run_of(grown), format=form), QUIET)
    tables = [Path(str(name)) for name in made.data["tables"]]
    assert {path.name for path in tables} >= {f"before_and_after{ending}", f"cost{ending}"}
    assert all(path.parent == Path(run_of(grown)) / "tables" and path.stat().st_size for path in tables)
    # The run is still a run, and rebuilding its report without tables leaves the same numbers.
    assert Run.open(Path(run_of(grown)), read_only=True).stages()
    assert report.run(ReportRequest(run=run_of(grown)), QUIET).data["matrix"] == grown.data["matrix"]


def test_an_unknown_form_of_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="format='xlsx': must be csv or latex"):
        ReportRequest(run="r", format="xlsx")


def test_comparing_needs_a_common_domain(world: World, grown: Report) -> None:
    from mfext.commands import pretrain
    from mfext.recipe import load_recipe
    from tests.commands.tiny_world import TINY

    flags = {"domain": str(world.capitals), "out": str(world.runs / "capitals-only"), "training.tokens": 2048}
    other = pretrain.run(
        load_recipe(
            "pretrain",
            None,
            [word for word in TINY if "default" not in word and "growth" not in word and "tokens" not in word],
            flags,
        ),
        QUIET,
    )
    with pytest.raises(InputError, match="no domain and split in common"):
        compared(grown, other)
