"""Which experts leave a model, and how many stay. Checks as in config.py, which gathers this into a Recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mfext.config_checks import require, require_at_least, require_choices

PruningCriterion = Literal["usage", "gate_mass", "contribution", "ablation", "random"]


@dataclass(frozen=True)
class PruningConfig:
    """How much is kept of the banks of `kinds` and `generations` ("all", "base", or names); other banks stay whole.

    `unit` share: `keep` of the experts stays. parameters, megabytes: `target` is the most that the experts kept may
    weigh, each with its rows of the router, a megabyte 10**6 bytes of float32. `budget` per_layer keeps the same share
    of every bank; global ranks the experts of all banks together. No bank keeps fewer than a token chooses.

    `criterion`: what makes an expert worth keeping on a text: its share of the choices (usage), the gate it is given
    (gate_mass), gate times the norm of its output (contribution), the loss without it (ablation), or nothing (random).

    Experts are chosen on the first `sample_bytes` of train text (ablation: on `ablation_windows` windows of it). The
    curve is of every criterion in `curve_criteria` at every share in `curve`.

    `max_loss_increase` (0.01 is 1 %) asks for the smallest model within it, in place of `keep` and `target`;
    `heal_tokens` is what the pruned model then trains on.

    `drop_generations` asks for something else: the generations named leave whole, and no other expert does.
    """

    criterion: PruningCriterion = "contribution"
    keep: float = 0.5
    budget: Literal["global", "per_layer"] = "global"
    unit: Literal["share", "parameters", "megabytes"] = "share"
    target: float | None = None
    kinds: Literal["both", "attention", "feedforward"] = "both"
    generations: str | tuple[str, ...] = "all"
    max_loss_increase: float | None = None
    heal_tokens: int = 0
    sample_bytes: int = 65_536
    ablation_windows: int = 32
    curve: tuple[float, ...] = (0.75, 0.5, 0.375, 0.25, 0.125)
    curve_criteria: tuple[PruningCriterion, ...] = ("contribution", "gate_mass", "usage", "ablation", "random")
    drop_generations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_choices(self)
        require(self, "keep", 0 < self.keep <= 1, "a share above 0, at most 1")
        if self.unit == "share":
            require(self, "target", self.target is None, "null where unit is share: keep says how much stays")
        else:
            given = self.target is not None and self.target > 0
            require(self, "target", given, f"how many {self.unit} of experts may stay, above 0, where that is the unit")
        require(self, "generations", len(self.generations) > 0, "all, base or a list of names")
        bounded = self.max_loss_increase is None or self.max_loss_increase >= 0
        require(self, "max_loss_increase", bounded, "at least 0 (0.01 allows 1 %), or null")
        require_at_least(0, self, "heal_tokens")
        require_at_least(1, self, "sample_bytes", "ablation_windows")
        require(self, "curve", all(0 < keep < 1 for keep in self.curve), "shares between 0 and 1")
        shares = self.keep != PruningConfig.keep or self.unit != "share" or self.max_loss_increase is not None
        alone = "given without keep, target and max_loss_increase: those choose single experts, these leave whole"
        require(self, "drop_generations", not (self.drop_generations and shares), alone)
