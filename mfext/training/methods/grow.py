"""Growth: only what the newest generation added trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mfext.errors import InputError
from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Grow:
    """Trains the newest generation's own tensors except its domain gate.

    The gate is taught before or after (`growth.gate.learns`) and stays fixed while the experts learn: a gate
    that moved would move the border between old and new domains that was calibrated.
    """

    trains: ClassVar[str] = (
        "the newest generation: experts, routers, changes to embedding and head; its gate and all older are frozen"
    )
    name: str = "grow"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = True

    def trainable(self, model: nn.Module) -> set[str]:
        """Raises InputError where the model has no generation yet."""
        generations = {
            int(name.split(".")[1]) for name, _ in model.named_parameters() if name.startswith("generations.")
        }
        if not generations:
            raise InputError(
                "method=grow has nothing to train",
                "this model has no generation",
                "grow it first, or train with method=full",
            )
        prefix = f"generations.{max(generations)}."
        gate = prefix + "gate."
        return {name for name, _ in model.named_parameters() if name.startswith(prefix) and not name.startswith(gate)}

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return self.trains
