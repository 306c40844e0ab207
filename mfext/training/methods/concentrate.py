"""Load concentration: fine-tuning that also moves the load to few experts, so that the others can be removed.

arXiv 2306.04640 pretrains with mutual information, which spreads the load over all experts, and fine-tunes with a
load-concentration loss before it removes what a domain does not use. `losses.concentration_loss` is mfext's form of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from mfext.config_methods import ConcentrateConfig
from mfext.errors import InputError
from mfext.model.language_model import ModelOutput
from mfext.model.losses import concentration_loss
from mfext.model.router import Router
from mfext.training.batch import Batch


@dataclass(frozen=True)
class Concentrate:
    """Trains every parameter; the penalty is the weight times the marginal entropy H(e) of every router of the chosen
    kinds, summed, in nats: the base's and those of every generation, over the tokens each of them decides for.

    The weight is a pure function of the stage's progress, so a resumed stage needs nothing to be remembered. The
    routers' balance loss, which raises the same entropy, is left out of the loss.
    """

    trains: ClassVar[str] = "every parameter, the load drawn to few experts instead of spread over all"
    settings: ConcentrateConfig = field(default_factory=ConcentrateConfig)
    name: str = "concentrate"
    starts_from: ClassVar[Literal["previous", "base"]] = "previous"
    balances: ClassVar[bool] = False

    def trainable(self, model: nn.Module) -> set[str]:
        """Raises InputError where the model routes nothing."""
        if not any(isinstance(module, Router) for module in model.modules()):
            what = "method=concentrate has nothing to concentrate"
            raise InputError(what, "this model is dense and has no experts", "use method=full")
        return {name for name, _ in model.named_parameters()}

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> Tensor:
        kinds = self.settings.kinds
        routings = [each for each in output.routings if kinds in ("both", each.site.kind)]
        return self.weight_at(batch.progress) * concentration_loss(routings, batch.valid_N)

    def weight_at(self, progress: float) -> float:
        """The weight after `progress` (0 to 1) of the stage: a line from 0 to its full size, then that."""
        rise = self.settings.rise_share
        return self.settings.weight * (min(1.0, progress / rise) if rise else 1.0)

    def describe(self) -> str:
        settings = self.settings
        return f"{self.trains}, weight {settings.weight:g}, kinds {settings.kinds}"
