"""What every training method answers, and the methods by name."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from mfext.config import MethodName
from mfext.training.methods.full import Full
from mfext.training.methods.grow import Grow


class Method(Protocol):
    """Which parameters one stage trains. Everything else is frozen and has no optimizer state."""

    @property
    def name(self) -> str:
        """The word used in recipes: `method=NAME`."""

    def trainable(self, model: nn.Module) -> set[str]:
        """Names (as in `model.named_parameters()`) of the parameters that train."""

    def describe(self) -> str:
        """One line for reports: what trains."""


def method_named(name: MethodName) -> Method:
    """The method a recipe names."""
    return Grow() if name == "grow" else Full()
