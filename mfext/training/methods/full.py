"""Full fine-tuning: the baseline that learns most and forgets most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Full:
    """Trains every parameter: also how a base is pretrained."""

    name: str = "full"

    def trainable(self, model: nn.Module) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    def describe(self) -> str:
        return "every parameter: embedding, head, norms, routers and experts"
