"""Where training runs and who else is told its numbers. Checks as in config.py, which gathers these into a Recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mfext.config_checks import require, require_at_least, require_choices

Strategy = Literal["single", "ddp"]


@dataclass(frozen=True)
class TrainerConfig:
    """Where training runs. `threads` None leaves torch's own choice."""

    strategy: Strategy = "single"
    accelerator: Literal["cpu", "gpu", "auto"] = "auto"
    devices: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(1, self, "devices")
        require(self, "devices", self.strategy == "ddp" or self.devices == 1, "1 unless trainer=ddp")
        require(self, "threads", self.threads is None or self.threads >= 1, "at least 1, or null")


@dataclass(frozen=True)
class LoggerConfig:
    """Extra loggers beside the CSV that is always written."""

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "mfext"
