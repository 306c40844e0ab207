"""Cost of a loss: hand-made curves."""

from __future__ import annotations

import math
import random

import pytest

from mfext.metrics.efficiency import Curve, common_levels, compare_efficiency, cost_at_loss, reach

SLOW = Curve("slow", (100, 200, 300, 400), (1, 2, 3, 4), (4.0, 3.0, 2.0, 1.5))
FAST = Curve("fast", (100, 200, 300, 400), (0.5, 1, 1.5, 2), (5.0, 4.0, 3.0, 2.5))


def test_a_level_between_two_points_is_reached_linearly_between_them() -> None:
    reached = reach(SLOW, 2.25)
    assert (reached.tokens, reached.cpu_s, reached.reason) == (275, 2.75, None)


def test_a_level_at_a_point_is_reached_there() -> None:
    for tokens, loss in zip(SLOW.tokens, SLOW.loss, strict=True):
        assert reach(SLOW, loss).tokens == tokens


def test_a_level_counts_from_its_first_crossing_though_the_loss_rises_again() -> None:
    bumpy = Curve("bumpy", (1, 2, 3, 4), (1, 2, 3, 4), (4.0, 2.0, 3.0, 1.0))
    assert reach(bumpy, 2.5).tokens == 1.75


@pytest.mark.parametrize(("loss", "reason"), [(1.0, "never reached"), (4.5, "below this loss at its first")])
def test_a_level_never_crossed_is_none_with_a_reason(loss: float, reason: str) -> None:
    reached = reach(SLOW, loss)
    assert reached.tokens is None
    assert reached.cpu_s is None
    assert reason in str(reached.reason)


def test_ratios_are_own_over_reference_in_tokens_and_in_time() -> None:
    (level,) = compare_efficiency([SLOW, FAST], "slow", [3.0])
    assert level.token_ratio == {"slow": 1.0, "fast": 1.5}
    assert level.time_ratio == {"slow": 1.0, "fast": 0.75}


def test_a_ratio_is_none_where_either_side_never_got_there() -> None:
    for reference in ("slow", "fast"):
        (level,) = compare_efficiency([SLOW, FAST], reference, [2.0])
        assert level.time_ratio["fast" if reference == "slow" else "slow"] is None
        assert "lowest: 2.5" in str(level.reached["fast"].reason)


def test_common_levels_are_those_that_every_curve_reached() -> None:
    levels = common_levels([SLOW, FAST], 5)
    assert levels == pytest.approx((3.7, 3.4, 3.1, 2.8, 2.5))
    assert all(reach(curve, loss).tokens is not None for loss in levels for curve in (SLOW, FAST))


def test_curves_that_share_no_loss_share_no_level() -> None:
    flat = Curve("flat", (1, 2), (1, 2), (1.0, 1.0))
    assert common_levels([SLOW, flat], 3) == ()


def test_a_curve_against_itself_is_one_everywhere_and_order_does_not_matter() -> None:
    chance = random.Random(0)
    for _ in range(20):
        losses = sorted((chance.uniform(1, 5) for _ in range(9)), reverse=True)
        curves = [Curve(name, tuple(range(1, 10)), tuple(range(2, 11)), tuple(losses)) for name in ("a", "b")]
        levels = common_levels(curves, 7)
        compared = compare_efficiency(curves, "a", levels)
        assert all(each.token_ratio["b"] == each.time_ratio["b"] == 1.0 for each in compared)
        swapped = compare_efficiency(curves[::-1], "a", levels)
        assert [each.time_ratio for each in swapped] == [each.time_ratio for each in compared]


def test_the_cost_at_a_loss_lies_between_neighbours_in_the_logarithm() -> None:
    points = [(2.0, 4.0), (3.0, 1.0), (1.0, 16.0)]
    assert cost_at_loss(points, 2.5)[0] == pytest.approx(2.0)
    assert cost_at_loss(points, 2.0) == (pytest.approx(4.0), None)


@pytest.mark.parametrize("points", [[], [(2.0, 1.0)], [(2.0, 1.0), (3.0, 0.5)]])
def test_the_cost_at_a_loss_nobody_had_is_none_with_a_reason(points: list[tuple[float, float]]) -> None:
    cost, reason = cost_at_loss(points, 1.9)
    assert cost is None
    assert "1.9000" in str(reason)


def test_points_that_are_no_curve_are_refused() -> None:
    for bad in ((1, 1), (2, 1)):
        with pytest.raises(AssertionError, match="tokens rise"):
            Curve("bad", bad, (1, 2), (1.0, 1.0))
    with pytest.raises(AssertionError, match="finite"):
        Curve("bad", (1, 2), (1, 2), (1.0, math.nan))
