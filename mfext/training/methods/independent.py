"""One model per domain, each from the base: what a domain could teach if nothing had to be remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Independent:
    """Trains every parameter of a copy of the base on one domain; no stage sees another's model."""

    trains: ClassVar[str] = "every parameter of a fresh copy of the base, one model per domain"
    name: str = "independent"
    starts_from: Literal["previous", "base"] = "base"

    def trainable(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return self.trains
