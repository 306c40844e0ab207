"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from mfext.config import TrainingConfig


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then cosine to its floor.

    The warm-up takes `warmup_share` of `total_steps` and reaches the peak on its last step; the
    cosine ends at `min_learning_rate_share` of the peak on step `total_steps - 1`.
    """
    warmup = round(training.warmup_share * total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    floor = training.min_learning_rate_share
    return training.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))
