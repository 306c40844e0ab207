"""Keeps non-finite numbers out of weights and optimizer state.

A bad batch without it trains on, turns every weight into NaN and "finishes". Here the step is
dropped: no gradient, so AdamW touches neither weights nor moments (nor decays them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from mfext.errors import DivergedError


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step over all processes: losses in nats per token, gradient norm before clipping.

    `penalty` is what the method added to the loss; None where it adds nothing.
    """

    loss_nats_per_token: float
    routing_loss: float
    penalty: float | None
    gradient_norm: float
    skipped: bool
    windows: int


class NonFiniteGuard:
    """Counts and drops steps whose loss or gradient is not finite; all processes decide alike."""

    def __init__(self, max_in_a_row: int) -> None:
        self.max_in_a_row = max_in_a_row
        self.bad_in_a_row = 0
        self.skipped_windows = 0
        self._losses: list[Tensor] = []
        self._has_penalty = False
        self._windows = 0

    def add(self, language: Tensor, routing: Tensor, penalty: Tensor | None, windows: int) -> None:
        """Note one micro-batch's scalar losses (detached here) and its number of windows (rows)."""
        added = torch.zeros_like(language) if penalty is None else penalty
        losses = [each.detach().double().to(language.device) for each in (language, routing, added)]
        self._losses.append(torch.stack(losses))
        self._has_penalty = penalty is not None
        self._windows += windows

    def check(self, parameters: Sequence[Parameter]) -> tuple[StepRecord, Tensor]:
        """The step's record and its gradient norm; drops the gradients where anything is not finite.

        Raises DivergedError after `max_in_a_row` dropped steps without a good one between.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = get_total_norm(gradients) if gradients else self._losses[-1].new_zeros(())
        losses = torch.stack(self._losses).mean(0)
        bad = ~(torch.isfinite(losses).all() & torch.isfinite(norm))
        numbers = torch.cat([losses, torch.stack([bad.double(), losses.new_tensor(float(self._windows))])])
        world = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            torch.distributed.all_reduce(numbers)
        loss, routing, added, bad_ranks, windows = numbers.tolist()
        penalty = added / world if self._has_penalty else None
        record = StepRecord(loss / world, routing / world, penalty, float(norm), bad_ranks > 0, int(windows))
        self._losses, self._windows = [], 0
        self._count(record, parameters)
        return record, norm

    def _count(self, record: StepRecord, parameters: Sequence[Parameter]) -> None:
        if not record.skipped:
            self.bad_in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.bad_in_a_row += 1
        self.skipped_windows += record.windows
        if self.bad_in_a_row >= self.max_in_a_row:
            losses = {"loss": record.loss_nats_per_token, "penalty": record.penalty or 0.0}
            what = next((name for name, value in losses.items() if not math.isfinite(value)), "gradient")
            raise DivergedError(
                f"training diverged: the {what} was not finite {self.bad_in_a_row} steps in a row",
                "",
                "the last committed state is intact; lower training.learning_rate or check the data",
            )
