"""Review: after a growth's training, only what decides who reaches its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mfext.errors import InputError
from mfext.model.generation import deciding_names
from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Review:
    """Trains the newest generation's routers (rows of the base's softmax in modes compete and preserve) and its gate.

    Which text it sees is the caller's: new text and probes of old text. The gate's thresholds must be
    calibrated anew afterwards; `growth.review.review` does all of it.
    """

    trains: ClassVar[str] = "the newest generation's routers and domain gate; its experts and all older are frozen"
    name: str = "review"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = True

    def trainable(self, model: nn.Module) -> set[str]:
        """Raises InputError where the model has no generation yet."""
        names = deciding_names(name for name, _ in model.named_parameters())
        if not names:
            raise InputError("nothing to review", "this model has no generation", "grow it first")
        return names

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return self.trains
