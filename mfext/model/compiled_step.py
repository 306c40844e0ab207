"""Which tensors of a model the compiled decoding step reads, and when it can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mfext.model.attention import ExpertAttention
from mfext.model.experts import AttentionExperts, FeedForwardExperts
from mfext.model.feedforward import ExpertFeedForward
from mfext.model.generation import Generation, MatrixChange, NormChange
from mfext.model.router import Router
from mfext_kernels.decode_step import (
    Change,
    DecodeStep,
    EndTensors,
    GrownEnds,
    GrownTensors,
    LayerTensors,
    SiteTensors,
    available,
    fits,
)

if TYPE_CHECKING:
    from mfext.model.cache import Cache
    from mfext.model.moduleformer import ModuleFormer


def compiled_step(model: ModuleFormer, cache: Cache) -> DecodeStep | None:
    """The compiled step of `model` (router mlp, every generation gated) on `cache`; None where it is not built or the
    tensors do not fit it."""
    if not available():
        return None
    generations = [model.generation(number) for number in range(1, len(model.generations) + 1)]
    layers = [
        _layer(attention, feedforward, norms, keys_values, tuple(_grown(each, number) for each in generations))
        for number, ((attention, feedforward, norms), keys_values) in enumerate(
            zip(model.sites(), cache.keys_values, strict=True)
        )
    ]
    ends = EndTensors(
        _norm(model.final_norm),
        model.embedding.weight,
        model.lm_head.weight,
        tuple(
            GrownEnds(_changed_norm(each.final_norm), _change(each.embedding), _change(each.head))
            for each in generations
        ),
    )
    return DecodeStep(layers, ends, model.config.layer_norm_eps) if fits(layers, ends) else None


def _layer(
    attention: ExpertAttention,
    feedforward: ExpertFeedForward,
    norms: tuple[nn.LayerNorm, nn.LayerNorm],
    kv: Tensor,
    grown: tuple[GrownTensors, ...],
) -> LayerTensors:
    chosen = attention.config.attention_experts_per_token, attention.config.feedforward_experts_per_token
    projections = None
    if attention.key is not None and attention.value is not None:
        key, value = attention.key, attention.value
        projections = (key.weight, key.bias, value.weight, value.bias)
    return LayerTensors(
        _site(_norm(norms[0]), attention.router, attention.experts, chosen[0]),
        _site(_norm(norms[1]), feedforward.router, feedforward.experts, chosen[1]),
        projections,
        kv,
        grown,
    )


def _grown(generation: Generation, number: int) -> GrownTensors:
    layer, config = generation.layer(number), generation.config
    chosen = config.attention_experts_per_token, config.feedforward_experts_per_token
    norms = _changed_norm(layer.attention_norm), _changed_norm(layer.feedforward_norm)
    return GrownTensors(
        _site(norms[0], layer.attention_router, layer.attention, chosen[0]),
        _site(norms[1], layer.feedforward_router, layer.feedforward, chosen[1]),
        _change(layer.key),
        _change(layer.value),
    )


def _site(
    norm: tuple[Tensor, Tensor] | None,
    router: nn.Module | None,
    experts: AttentionExperts | FeedForwardExperts | None,
    num_chosen: int,
) -> SiteTensors:
    weights = None
    if isinstance(router, Router):
        weights = (router.hidden.weight, router.hidden.bias, router.output.weight)
    return SiteTensors(norm, weights, _matrices(experts), num_chosen)


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def _changed_norm(change: NormChange | None) -> tuple[Tensor, Tensor] | None:
    return None if change is None else (change.weight, change.bias)


def _matrices(experts: AttentionExperts | FeedForwardExperts | None) -> tuple[Tensor, Tensor] | None:
    if experts is None:
        return None
    return (experts.query, experts.output) if isinstance(experts, AttentionExperts) else (experts.up, experts.down)


def _change(change: MatrixChange | None) -> Change | None:
    if change is None:
        return None
    return (change.full,) if hasattr(change, "full") else (change.left, change.right)
