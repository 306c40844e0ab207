"""Within-stage metrics against hand-made curves, the paper's formulas, and their limits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.metrics.ledger import Ledger
from mfext.metrics.stability import WithinCurves, measure_stability, min_acc, stability_gap_recovery, wc_acc
from tests.metrics.rows import row

# Losses by domain and stage, in the order of their steps. Stage 0 is the base, code is stage 1, german stage 2.
CURVES = {
    "prose": ((2.0,), (2.5, 3.0, 2.25), (2.75, 2.5, 2.5)),
    "code": ((5.0,), (4.0, 3.0, 1.5), (2.0, 1.75, 1.25)),
    "german": ((6.0,), (6.0, 5.5, 5.5), (4.0, 3.0, 2.0)),
    "chinese": ((8.0,), (9.0, 9.0, 9.0), (8.0, 8.5, 8.0)),
}
LEARNED: dict[str, int | None] = {"prose": 0, "code": 1, "german": 2, "chinese": None}


def ledger(curves: dict[str, tuple[tuple[float, ...], ...]], split: str = "within") -> Ledger:
    """Rows of 2 bytes, their steps in reverse, so that the order of rows is not the order of steps."""
    rows = [
        row(stage, domain, [(2 * loss, 2)], step=100 * number, split=split)
        for domain, stages in curves.items()
        for stage, losses in enumerate(stages)
        for number, loss in reversed(list(enumerate(losses, start=stage > 0)))
    ]
    return Ledger(tuple(rows))


GOLDEN = WithinCurves.from_ledger(ledger(CURVES), LEARNED)


def test_every_within_stage_metric_has_its_golden_value() -> None:
    values = measure_stability(GOLDEN)
    assert values["min_acc"].domains == {"prose": 3.0, "code": 2.0}
    assert values["min_acc"].value == 2.5
    assert values["wc_acc"].domains == {"prose": 3.0, "code": 2.0, "german": 2.0}
    assert values["stability_gap.depth"].domains == {
        "prose in stage 1": 3.0 - 2.0,
        "prose in stage 2": 2.75 - 2.25,
        "code in stage 2": 2.0 - 1.5,
    }
    # Of the depths 1, 0.5 and 0.5 come back: 3 - 2.25, 2.75 - 2.5, and all of it where the end is below the start.
    assert values["stability_gap.recovery"].value == pytest.approx((0.75 + 0.25 + 0.5) / 2)
    assert {name: value.direction for name, value in values.items()} == {
        "min_acc": "lower is better",
        "wc_acc": "lower is better",
        "stability_gap.depth": "lower is better",
        "stability_gap.recovery": "higher is better",
    }


def test_de_lange_min_acc_and_worst_case_accuracy() -> None:
    """De Lange et al. 2023: min-ACC = mean over i < k of min over n after task i of A(E_i, f_n);
    WC-ACC = A(E_k, f_t) / k + (1 - 1/k) min-ACC, on accuracies; a loss is -A.
    """
    accuracy = {"prose": ((0.9,), (0.5, 0.7), (0.6, 0.8)), "code": ((0.1,), (0.6, 0.9), (0.4, 0.7))}
    accuracy["german"] = ((0.0,), (0.1, 0.2), (0.6, 0.95))
    losses = {domain: tuple(tuple(-a for a in each) for each in stages) for domain, stages in accuracy.items()}
    flat = {(stage, domain): each for domain, stages in losses.items() for stage, each in enumerate(stages)}
    curves = WithinCurves(flat, {"prose": 0, "code": 1, "german": 2}, 2)
    minimum = (min(0.5, 0.7, 0.6, 0.8) + min(0.4, 0.7)) / 2
    assert min_acc(curves).value == pytest.approx(-minimum)
    assert wc_acc(curves).value == pytest.approx(-(0.95 / 3 + (1 - 1 / 3) * minimum))


def test_a_repeated_domain_counts_from_its_latest_stage() -> None:
    curves = WithinCurves.from_ledger(ledger(CURVES), {**LEARNED, "prose": 2})
    assert measure_stability(curves)["min_acc"].domains == {"code": 2.0}


def test_without_within_stage_rows_there_are_reasons_and_no_numbers() -> None:
    values = measure_stability(WithinCurves.from_ledger(ledger(CURVES, split="validation"), LEARNED)).values()
    assert {(value.value, value.reason) for value in values} == {(None, "the run has no within-stage evaluations")}


def test_only_the_base_has_no_old_domain() -> None:
    values = measure_stability(WithinCurves.from_ledger(ledger({"prose": ((2.0,),)}), {"prose": 0})).values()
    assert {value.reason for value in values} == {"no domain was learned before the last stage"}


def test_a_stage_measured_only_at_its_end_shows_no_gap_and_gives_no_number() -> None:
    curves = WithinCurves.from_ledger(ledger({**CURVES, "prose": ((2.0,), (2.5, 3.0, 2.25), (2.5,))}), LEARNED)
    values = measure_stability(curves)
    assert all(value.value is None for value in values.values())
    assert str(values["min_acc"].reason).endswith("missing for: prose")
    assert str(values["stability_gap.depth"].reason).endswith("missing for: prose in stage 2")
    assert values["min_acc"].domains == {"code": 2.0}


def test_a_gap_needs_the_loss_its_stage_started_from() -> None:
    curves = WithinCurves.from_ledger(ledger({**CURVES, "prose": ((), *CURVES["prose"][1:])}), LEARNED)
    values = measure_stability(curves)
    assert str(values["stability_gap.depth"].reason).endswith("missing for: prose in stage 1")
    assert values["min_acc"].value == 2.5


def test_a_row_that_scored_no_byte_is_no_measurement() -> None:
    empty = row(2, "prose", [], step=50, split="within")
    curves = WithinCurves.from_ledger(Ledger((empty,)), {"prose": 0})
    assert curves.curves == {}


def test_where_nothing_rises_there_is_nothing_to_recover_from() -> None:
    curves = WithinCurves.from_ledger(ledger({"prose": ((2.0,), (1.75, 1.5))}), {"prose": 0})
    values = measure_stability(curves)
    assert values["stability_gap.depth"].value == 0.0
    assert values["stability_gap.recovery"].value is None
    assert "nothing to recover from" in str(values["stability_gap.recovery"].reason)


LOSSES = st.floats(0.01, 20.0)
STAGE = st.lists(LOSSES, min_size=2, max_size=5).map(tuple)


@settings(deadline=None, max_examples=60)
@given(LOSSES, st.lists(STAGE, min_size=1, max_size=4))
def test_depth_is_never_negative_and_recovery_is_a_share(start: float, stages: list[tuple[float, ...]]) -> None:
    flat = {(number, "prose"): curve for number, curve in enumerate([(start,), *stages])}
    curves = WithinCurves(flat, {"prose": 0}, len(stages))
    values = measure_stability(curves)
    assert all(depth >= 0 for depth in values["stability_gap.depth"].domains.values())
    worst, recovered = values["min_acc"].value, stability_gap_recovery(curves).value
    assert worst == max(max(curve) for curve in stages)
    assert recovered is None or 0 <= recovered <= 1


@settings(deadline=None, max_examples=30)
@given(LOSSES, st.integers(1, 4))
def test_constant_curves_have_no_gap(loss: float, num_stages: int) -> None:
    flat = {(stage, "prose"): (loss,) * 3 for stage in range(num_stages + 1)}
    values = measure_stability(WithinCurves(flat, {"prose": 0}, num_stages))
    assert values["stability_gap.depth"].value == 0.0
    assert values["min_acc"].value == values["wc_acc"].value == loss
