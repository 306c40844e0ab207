from __future__ import annotations

import pytest

from mfext.config import TrainingConfig
from mfext.training.schedule import learning_rate

TRAINING = TrainingConfig(learning_rate=1.0, warmup_share=0.1, min_learning_rate_share=0.2)


def test_the_warm_up_rises_linearly_and_reaches_the_peak_on_its_last_step() -> None:
    assert [learning_rate(step, 100, TRAINING) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


def test_the_cosine_starts_at_the_peak_and_ends_at_the_floor_on_the_last_step() -> None:
    assert learning_rate(10, 100, TRAINING) == pytest.approx(1.0)
    assert learning_rate(99, 100, TRAINING) == pytest.approx(0.2)
    rates = [learning_rate(step, 100, TRAINING) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_a_stage_of_one_step_has_a_learning_rate() -> None:
    assert 0 < learning_rate(0, 1, TRAINING) <= 1.0
