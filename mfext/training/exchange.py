"""What goes into a fit and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset

from mfext.config import TrainingConfig
from mfext.config_machine import LoggerConfig, TrainerConfig


class Stream(Protocol):
    """Training data whose order is a pure function of (seed, stage, step): domains.stream.TokenStream."""

    def dataset(
        self, start_step: int, end_step: int, accumulation: int, rank: int, world: int
    ) -> Dataset[Mapping[str, Tensor]]:
        """Sized dataset; item i is this process's i-th micro-batch from `start_step` on."""


class Commit(Protocol):
    """Stores progress durably before it returns: (optimizer steps done, tensors, plain JSON state)."""

    def __call__(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object], /) -> None: ...


class Progress(Protocol):
    """Shows how far a fit is; implemented by mfext.report for the terminal."""

    def start(self, total: int, done: int, label: str) -> None:
        """`done` of `total` steps are behind us; `label` names the stage."""

    def update(self, done: int, numbers: Mapping[str, float]) -> None:
        """`done` steps are behind us; `numbers` are the latest row of metrics.csv."""

    def close(self) -> None:
        """The fit is over, for whatever reason."""


class NoProgress:
    """Shows nothing."""

    def start(self, total: int, done: int, label: str) -> None: ...

    def update(self, done: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class ProgressState:
    """What a commit stored: where to continue. `tensors` and `state` are as `Commit` received them."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, object]


@dataclass(frozen=True)
class FitSettings:
    """One stage's fit. `log_folder` receives metrics.csv; position in the data is (seed, stage, step).

    With `until` the fit stops after that step, commits, and leaves the rest of the stage to the next one.
    """

    training: TrainingConfig
    log_folder: Path
    seed: int
    stage: int
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    label: str = "training"
    until: int | None = None

    @property
    def end(self) -> int:
        """The optimizer step this fit ends at."""
        return self.training.steps if self.until is None else min(self.until, self.training.steps)


@dataclass(frozen=True)
class FitResult:
    """How a fit went. `optimizer` is its final state by parameter name (`PARAMETER/KEY`).

    `loss_nats_per_token` is the mean of the last logged interval. `frozen_ok`: every frozen
    tensor has the bytes it started the stage with, on every process. `notes` are lines a user
    should read, e.g. that the machine differs from the one the progress was made on.
    """

    steps: int
    tokens: int
    wall_s: float
    loss_nats_per_token: float | None
    skipped_windows: int
    frozen_ok: bool
    frozen_sha256: str
    optimizer: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1
