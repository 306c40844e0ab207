"""Replay: full fine-tuning that keeps reading a little old text (Robins 1995, "Catastrophic forgetting, rehearsal
and pseudorehearsal"; for language models de Masson d'Autume et al. 2019, arXiv 1906.01076)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Replay:
    """Trains every parameter. All that differs from `Full` is the stream: domains.replay.ReplayStream."""

    trains: ClassVar[str] = "every parameter; a share of the windows comes from a small buffer of old text"
    name: str = "replay"
    starts_from: Literal["previous", "base"] = "previous"

    def trainable(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return self.trains
