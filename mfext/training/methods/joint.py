"""Joint training: every domain at once, from the base. The upper reference that forgets nothing by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Joint:
    """Trains every parameter on the text of all domains so far together, each time from the base."""

    trains: ClassVar[str] = "every parameter, from the base, on the text of all domains at once"
    name: str = "joint"
    starts_from: Literal["previous", "base"] = "base"

    def trainable(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return self.trains
