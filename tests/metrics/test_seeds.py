"""Intervals over seeds: Student's t against known values, pairing, Fieller's ratio, and honesty about few seeds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.metrics.seeds import (
    SeedInterval,
    difference_over_seeds,
    mean_over_seeds,
    ratio_over_seeds,
    student_t_quantile,
)

# Two-sided 95 % points of Student's t by degrees of freedom, with the digits that statistics software prints.
T95 = {
    1: 12.706204736174698,
    2: 4.302652729749464,
    3: 3.182446305283710,
    4: 2.776445105197793,
    5: 2.570581835636314,
    9: 2.262157162798205,
    10: 2.228138851986274,
    29: 2.045229642132703,
    30: 2.042272456301238,
    120: 1.979930405082453,
}


@pytest.mark.parametrize("degrees", sorted(T95))
def test_the_quantile_of_students_t_is_the_tables(degrees: int) -> None:
    assert student_t_quantile(0.95, degrees) == pytest.approx(T95[degrees], rel=1e-10)


def test_the_quantile_at_other_confidences_and_in_the_normal_limit() -> None:
    assert student_t_quantile(0.5, 1) == pytest.approx(1.0, rel=1e-12)
    assert student_t_quantile(0.99, 4) == pytest.approx(4.604094871415897, rel=1e-10)
    assert student_t_quantile(0.9, 7) == pytest.approx(1.894578605061305, rel=1e-10)
    assert student_t_quantile(0.95, 1_000_000) == pytest.approx(1.959963984540054, rel=1e-5)


def test_the_mean_and_its_interval_are_those_by_hand() -> None:
    interval = mean_over_seeds({3: 5.0, 1: 1.0, 2: 3.0})
    half = T95[2] * 2.0 / math.sqrt(3)
    assert (interval.estimate, interval.seeds, interval.reason) == (3.0, (1, 2, 3), None)
    assert (interval.low, interval.high) == (pytest.approx(3.0 - half), pytest.approx(3.0 + half))


def test_one_seed_is_not_testable_and_keeps_its_number() -> None:
    assert mean_over_seeds({7: 0.5}) == SeedInterval(0.5, None, None, (7,), "not testable: 1 seed")
    assert mean_over_seeds({}) == SeedInterval(None, None, None, (), "not testable: 0 seeds")


def test_a_run_without_the_number_is_not_left_out_silently() -> None:
    interval = mean_over_seeds({1: 0.5, 2: None, 3: 0.25})
    assert (interval.estimate, interval.reason) == (None, "not testable: undefined for seed 2")


def test_equal_numbers_have_an_interval_of_no_width() -> None:
    assert mean_over_seeds({1: 0.5, 2: 0.5}) == SeedInterval(0.5, 0.5, 0.5, (1, 2))
    assert ratio_over_seeds({1: 0.5, 2: 0.5}, {1: 2.0, 2: 2.0}) == SeedInterval(0.25, 0.25, 0.25, (1, 2))


def test_pairing_by_seed_removes_what_the_seed_does_to_both() -> None:
    a = {1: 1.0, 2: 5.0, 3: 9.0}
    b = {1: 1.25, 2: 5.5, 3: 9.75}
    interval = difference_over_seeds(a, b)
    half = T95[2] * 0.25 / math.sqrt(3)
    assert interval.estimate == 0.5
    assert (interval.low, interval.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def test_only_seeds_that_both_methods_ran_are_compared() -> None:
    assert difference_over_seeds({1: 1.0, 2: 2.0, 3: 3.0}, {2: 2.5, 3: 3.5, 4: 9.0}).seeds == (2, 3)
    one = difference_over_seeds({1: 1.0, 2: 2.0}, {2: 2.5})
    assert (one.estimate, one.reason) == (0.5, "not testable: 1 seed run by both")
    none = ratio_over_seeds({1: 1.0}, {2: 2.0})
    assert (none.estimate, none.reason) == (None, "not testable: 0 seeds run by both")
    assert ratio_over_seeds({1: 1.0}, {1: 2.0}).reason == "not testable: 1 seed run by both"
    assert "undefined for seed 1" in str(difference_over_seeds({1: None, 2: 1.0}, {1: 1.0, 2: 1.0}).reason)


def test_the_ends_of_fiellers_interval_are_where_the_t_test_turns() -> None:
    top, bottom = {1: 0.010, 2: 0.014, 3: 0.013}, {1: 0.30, 2: 0.34, 3: 0.38}
    interval = ratio_over_seeds(top, bottom)
    assert interval.estimate == pytest.approx(0.037 / 1.02)
    assert interval.low is not None and interval.high is not None
    assert interval.low < 0.037 / 1.02 < interval.high
    above = mean_over_seeds({seed: top[seed] - interval.low * bottom[seed] for seed in top})
    below = mean_over_seeds({seed: top[seed] - interval.high * bottom[seed] for seed in top})
    assert above.low == pytest.approx(0.0, abs=1e-12) and below.high == pytest.approx(0.0, abs=1e-12)


def test_a_denominator_that_may_be_zero_gives_no_interval() -> None:
    noisy = ratio_over_seeds({1: 1.0, 2: 1.1}, {1: 0.5, 2: -0.25})
    assert noisy.estimate == pytest.approx(2.1 / 0.25)
    assert (noisy.low, noisy.high, noisy.reason) == (None, None, "not testable: the denominator may be 0")
    zero = ratio_over_seeds({1: 1.0, 2: 1.0}, {1: 1.0, 2: -1.0})
    assert (zero.estimate, zero.reason) == (None, "not testable: the denominator may be 0")


def test_the_intervals_hold_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    inside_mean = inside_ratio = 0
    for _ in range(1000):
        common = random.normal(0, 0.05, 4)
        top = dict(enumerate((0.5 + common + random.normal(0, 0.02, 4)).tolist()))
        bottom = dict(enumerate((2.0 + common + random.normal(0, 0.1, 4)).tolist()))
        mean, ratio = mean_over_seeds(top), ratio_over_seeds(top, bottom)
        inside_mean += mean.low is not None and mean.high is not None and mean.low <= 0.5 <= mean.high
        inside_ratio += ratio.low is not None and ratio.high is not None and ratio.low <= 0.25 <= ratio.high
    # Both are exact under normality: binomial(1000, 0.95), four standard deviations of 6.9.
    assert abs(inside_mean - 950) < 28 and abs(inside_ratio - 950) < 28


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.integers(1, 99), st.floats(-5, 5), min_size=2, max_size=6))
def test_the_order_of_seeds_changes_nothing(values: dict[int, float]) -> None:
    backwards = dict(reversed(values.items()))
    assert mean_over_seeds(values) == mean_over_seeds(backwards)
    interval = mean_over_seeds(values)
    assert interval.low is not None and interval.high is not None and interval.estimate is not None
    assert interval.low <= interval.estimate <= interval.high


def test_an_interval_is_plain_json() -> None:
    assert json.loads(json.dumps(mean_over_seeds({7: 0.5}).to_json())) == {
        "estimate": 0.5,
        "low": None,
        "high": None,
        "seeds": [7],
        "reason": "not testable: 1 seed",
    }
