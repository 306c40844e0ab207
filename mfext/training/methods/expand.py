"""Block expansion: whole new layers learn, the old ones stay (LLaMA-Pro, Wu et al. 2024, arXiv 2401.02415).

The layers come from growth/plan.py (`plan_expansion`): copies of existing ones whose output projections are zero, so
that the expanded model starts as the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from mfext.errors import InputError
from mfext.model.language_model import ModelOutput
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Expand:
    """Trains the layers numbered `new_blocks` whole: norms, routers, keys, values and experts."""

    trains: ClassVar[str] = "the layers just inserted, whole: norms, routers, keys, values and experts"
    new_blocks: tuple[int, ...]
    name: str = "expand"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = True

    def trainable(self, model: nn.Module) -> set[str]:
        """Raises InputError where there is no such layer."""
        chosen: set[str] = set()
        for block in self.new_blocks:
            own = {name for name, _ in model.named_parameters() if name.startswith(f"blocks.{block}.")}
            if not own:
                raise InputError(f"no layer {block}", "method=expand", "expand the model first: growth.plan_expansion")
            chosen |= own
        return chosen

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> None:
        return None

    def describe(self) -> str:
        return f"layers {', '.join(map(str, self.new_blocks))}, inserted for this stage; all others are frozen"
