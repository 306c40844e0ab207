"""What the sites of one forward share, and what each returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mfext.model.cache import Cache
from mfext.model.generation import Generation, GenerationLayer, OpenTokens
from mfext.model.positions import Positions
from mfext.model.router import Routing


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward shares: positions, generations, cache, what to return."""

    positions: Positions
    open_generations: tuple[OpenTokens, ...]
    competing: tuple[Generation, ...]
    cache: Cache | None
    return_attentions: bool


@dataclass(frozen=True)
class SiteOutput:
    """A site's residual update (B, T, D), its routings, and its attention weights (B, K, H, T, S) where asked."""

    update_BTD: Tensor
    routings: tuple[Routing, ...]
    weights: Tensor | None = None


def competing_layers(shared: Pass, layer: int) -> list[GenerationLayer]:
    """The layers of the generations that compete in the base's softmax."""
    layers = [generation.layers[layer] for generation in shared.competing]
    return [each for each in layers if isinstance(each, GenerationLayer)]
