"""The untouched base: the lower reference that forgets nothing because it learns nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Frozen:
    """Trains nothing: a stage is measured and not fitted (`fit` refuses a model in which nothing trains)."""

    trains: ClassVar[str] = "nothing: the base as it is"
    name: str = "frozen"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = True

    def trainable(self, model: nn.Module) -> set[str]:
        return set()

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return self.trains
