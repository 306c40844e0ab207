"""False opens, false closes and lag of the domain gates, from a stage's details as they are written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mfext.errors import InputError
from mfext.metrics.details import read_details
from mfext.metrics.gates import GatedGeneration, GateMeasurements, gate_lag, measure_gates


def gate(number: int, share_open: float, share_not_full: float, lag: float) -> dict[str, object]:
    return {"gate": number, "share_open": share_open, "share_not_full": share_not_full, "lag_tokens_mean": lag}


WRITTEN = json.loads(
    json.dumps(
        {
            "prose": {"usage": None, "gates": [gate(0, 0.01, 1.0, 2.0), gate(1, 0.03, 1.0, 0.0)]},
            "code": {"usage": None, "gates": [gate(0, 0.97, 0.05, 8.0), gate(1, 0.02, 1.0, 4.0)]},
            "german": {"usage": None, "gates": [gate(0, 0.5, 0.9, 6.0), gate(1, 0.99, 0.15, 16.0)]},
            "chinese": {"usage": None, "gates": [gate(0, 0.7, 0.7, 1.0), gate(1, 0.8, 0.6, 1.0)]},
        }
    )
)
MEASURED = GateMeasurements(
    details=read_details(WRITTEN),
    generations=(GatedGeneration(0, "code", ("code",), 1), GatedGeneration(1, "german", ("german",), 2)),
    first_stage={"prose": 0, "code": 1, "german": 2, "chinese": None},
)


def test_old_domains_are_false_opens_and_own_domains_false_closes() -> None:
    values = measure_gates(MEASURED)
    assert values["gate.false_open"].domains == {"code on prose": 0.01, "german on prose": 0.03, "german on code": 0.02}
    assert values["gate.false_open"].value == pytest.approx(0.02)
    assert values["gate.false_close"].domains == {"code on code": 0.05, "german on german": 0.15}
    assert values["gate.false_close"].value == pytest.approx(0.1)
    assert values["gate.lag"].value == pytest.approx((2 + 0 + 4 + 8 + 16) / 5)
    assert [(value.unit, value.direction) for value in values.values()] == [
        ("share of tokens", "lower is better"),
        ("share of tokens", "lower is better"),
        ("tokens", "lower is better"),
    ]


def test_a_later_domain_and_a_bystander_are_neither_old_nor_own() -> None:
    keys = gate_lag(MEASURED).domains
    assert "code on german" not in keys and not any("chinese" in key for key in keys)


def test_a_domain_grown_twice_is_own_for_both_generations_and_old_for_those_between() -> None:
    again = GatedGeneration(2, "code again", ("code",), 3)
    measured = replace(MEASURED, generations=(*MEASURED.generations, again))
    assert "code again on code" not in measured.of_old() and "german on code" in measured.of_old()
    assert measured.of_own().keys() == {"code on code", "german on german", "code again on code"}


def test_a_gate_that_was_not_measured_is_named() -> None:
    details = {name: each for name, each in MEASURED.details.items() if name != "german"}
    values = measure_gates(replace(MEASURED, details=details))
    assert values["gate.false_close"].reason == "the gate was not measured for: german on german"
    assert values["gate.false_close"].domains == {"code on code": 0.05}
    assert values["gate.false_open"].value is not None


def test_without_gates_there_are_reasons_and_no_numbers() -> None:
    values = measure_gates(replace(MEASURED, generations=())).values()
    assert {(value.value, value.reason) for value in values} == {(None, "no generation has a domain gate")}
    alone = replace(MEASURED, first_stage={"code": 1, "german": 1})
    assert measure_gates(replace(alone, generations=alone.generations[:1]))["gate.false_open"].reason == (
        "no domain was trained before a gated generation"
    )


def test_a_damaged_gate_entry_is_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"missing key 'share_open'.*gates\[0\]"):
        read_details({"prose": {"usage": None, "gates": [{"gate": 0}]}})
