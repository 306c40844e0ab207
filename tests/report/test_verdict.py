"""The verdict says what happened in words nobody can misread."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mfext.report.verdict import run_verdict

LN2 = math.log(2)


def verdict_with(build_result: Any, **changes: Any) -> tuple[str, tuple[str, ...]]:
    data = build_result().data | changes
    found = run_verdict(data)
    return "\n".join(found.lines), found.alarms


def mean(difference: float, low: float | None, high: float | None, reason: str = "") -> dict[str, Any]:
    def bits(value: float | None) -> float | None:
        return None if value is None else value * LN2

    return {"difference": bits(difference), "low": bits(low), "high": bits(high), "reason": reason}


def forgetting(*arguments: Any, **named: Any) -> dict[str, Any]:
    return {"domains": {"prose": {}}, "mean": mean(*arguments, **named)}


def test_a_kept_promise_is_said_plainly(build_result: Any) -> None:
    text, alarms = verdict_with(build_result, forgetting=forgetting(0.004, 0.002, 0.006))
    assert "learned python_code: 3.10 → 1.55 bits per byte (−50\u202f%)" in text
    assert "forgot 0.004 ± 0.002 bits per byte on 1 old domain" in text
    assert "frozen parts bit-identical" in text and "growth started as the identity" in text
    assert alarms == ()


def test_changed_frozen_parts_shout(build_result: Any) -> None:
    text, alarms = verdict_with(build_result, frozen_ok=False)
    assert len(alarms) == 1 and alarms[0].startswith("FROZEN PARTS CHANGED")
    assert "bit-identical" not in text


def test_a_gated_growth_that_is_no_identity_shouts_but_a_competing_one_only_says_so(build_result: Any) -> None:
    text, alarms = verdict_with(build_result, identity_at_growth=1e-3)
    assert alarms[0].startswith("GROWTH WAS NOT THE IDENTITY") and "identity" not in text
    text, alarms = verdict_with(build_result, identity_at_growth=1e-3, mode="compete")
    assert "moved the logits by up to 0.001" in text and alarms == ()


def test_a_detach_that_does_not_give_the_base_back_shouts(build_result: Any) -> None:
    _, alarms = verdict_with(build_result, detach_equals_base=False)
    assert alarms[0].startswith("DETACHING DOES NOT GIVE THE BASE BACK")


def test_a_loss_that_did_not_fall_is_not_called_learned(build_result: Any) -> None:
    text, alarms = verdict_with(build_result, learned={"code": {"before": 3.0, "after": 3.0 + 0.1 * LN2}})
    assert "did not learn code" in text and "\nlearned code" not in text
    assert alarms[0].startswith("NOTHING WAS LEARNED")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0.001, -0.001, 0.003), "no measurable forgetting: 0.001 ± 0.002 bits per byte on 1 old domain"),
        ((-0.02, -0.03, -0.01), "even improved by 0.020 ± 0.010 bits per byte"),
        ((0.0, 0.0, 0.0), "forgot nothing"),
        ((0.41, 0.1, 0.45), "forgot 0.410 [0.100, 0.450] bits per byte"),
        ((0.00004, 0.00002, 0.00006), "forgot 0.00004 ± 0.00002 bits per byte"),
        ((0.3, None, None, "not testable: fewer than 2 documents"), "forgot 0.300 bits per byte on 1 old domain (not"),
    ],
)
def test_forgetting_is_worded_by_size_and_certainty(build_result: Any, given: Any, expected: str) -> None:
    text, _ = verdict_with(build_result, forgetting=forgetting(*given))
    assert expected in text


def test_unmeasured_forgetting_is_never_a_number(build_result: Any) -> None:
    nothing = {"domains": {}, "mean": {"difference": None, "low": None, "high": None, "reason": "no domain to compare"}}
    text, _ = verdict_with(build_result, forgetting=nothing)
    assert "forgetting is not known: no domain to compare" in text


def test_a_pretraining_run_speaks_of_no_forgetting(build_result: Any) -> None:
    data = build_result().data
    pretrained = {"domains": ["prose"], "stages": [{"name": "base"}], "matrix": {"nll_per_byte": [[2.31 * LN2]]}}
    assert run_verdict({**pretrained, "params": data["params"]}).lines == ("measured: prose 2.31 bits per byte",)


def test_many_learned_domains_are_summed_up(build_result: Any) -> None:
    gains = {f"d{index}": {"before": 3 * LN2, "after": 2 * LN2} for index in range(6)}
    text, _ = verdict_with(build_result, learned=gains)
    assert "learned 6 domains: 3.00 → 2.00 bits per byte on average" in text
