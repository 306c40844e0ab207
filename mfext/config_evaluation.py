"""How losses are measured. Checks as in config.py, which gathers this into a Recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mfext.config_checks import require, require_at_least, require_choices


@dataclass(frozen=True)
class EvaluationConfig:
    """How losses are measured. `max_bytes` caps each domain's split (whole documents, first in
    the split's fixed order); None takes all. `test` is for final numbers only.

    `within_every_steps` also measures every so many optimizer steps inside a stage, on the first
    `within_max_bytes` of each validation split: the stability gap. None measures stages only.
    """

    split: Literal["validation", "test"] = "validation"
    max_bytes: int | None = None
    window: int = 256
    batch_size: int = 32
    bootstrap_samples: int = 2000
    within_every_steps: int | None = None
    within_max_bytes: int = 8_192

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(2, self, "window")
        require(self, "window", self.window % 2 == 0, "even (the stride is half of it)")
        require_at_least(1, self, "batch_size", "bootstrap_samples")
        some = self.max_bytes is None or self.max_bytes > 0
        require(self, "max_bytes", some, "positive, or null for all")
        often = self.within_every_steps is None or self.within_every_steps >= 1
        require(self, "within_every_steps", often, "at least 1, or null to measure stages only")
        require_at_least(1, self, "within_max_bytes")
