"""What the sites of one forward share, and what each returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mfext.model.cache import Cache
from mfext.model.generation import Generation, GenerationLayer, OpenTokens
from mfext.model.positions import Positions
from mfext.model.router import RouterRows, Routing, Site, route, route_preserving


@dataclass(frozen=True)
class Pass:
    """What every layer of one forward shares: positions, generations, cache, what to return.

    `open_generations` have routers of their own: the gated ones open on some token, and those of mode side.
    `competing` route in the base's softmax. `observed`: routings carry the norms of the experts' outputs.
    """

    positions: Positions
    open_generations: tuple[OpenTokens, ...]
    competing: tuple[Generation, ...]
    cache: Cache | None
    return_attentions: bool
    observed: bool = False


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


def route_jointly(logits_NE: Tensor, rows: Sequence[RouterRows], num_chosen: int, site: Site, shared: Pass) -> Routing:
    """The base's decision with the competing generations' `rows` behind its own, by their mode."""
    if not rows or all(each.config.mode == "compete" for each in shared.competing):
        return route(logits_NE, num_chosen, site)
    added = [each.weight.shape[0] for each in rows]
    return route_preserving(logits_NE, [logits_NE.shape[-1] - sum(added), *added], num_chosen, site)
