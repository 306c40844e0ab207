"""Which tensors of a model's base the compiled decoding step reads, and when it can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mfext.model.attention import ExpertAttention
from mfext.model.feedforward import ExpertFeedForward
from mfext.model.router import Router
from mfext_kernels.decode_step import DecodeStep, LayerTensors, SiteTensors, available, fits

if TYPE_CHECKING:
    from mfext.model.cache import Cache
    from mfext.model.moduleformer import ModuleFormer


def compiled_step(model: ModuleFormer, cache: Cache) -> DecodeStep | None:
    """The compiled step of `model` (router mlp) on `cache`; None where it is not built or the tensors do not fit it."""
    if not available():
        return None
    layers = [
        _layer(attention, feedforward, norms, keys_values)
        for (attention, feedforward, norms), keys_values in zip(model.sites(), cache.keys_values, strict=True)
    ]
    return DecodeStep(layers, model.config.layer_norm_eps) if fits(layers) else None


def _layer(
    attention: ExpertAttention, feedforward: ExpertFeedForward, norms: tuple[nn.LayerNorm, nn.LayerNorm], kv: Tensor
) -> LayerTensors:
    chosen = attention.config.attention_experts_per_token, attention.config.feedforward_experts_per_token
    projections = None
    if attention.key is not None and attention.value is not None:
        key, value = attention.key, attention.value
        projections = (key.weight, key.bias, value.weight, value.bias)
    return LayerTensors(
        _site(norms[0], attention.router, (attention.experts.query, attention.experts.output), chosen[0]),
        _site(norms[1], feedforward.router, (feedforward.experts.up, feedforward.experts.down), chosen[1]),
        projections,
        kv,
    )


def _site(norm: nn.LayerNorm, router: Router, experts: tuple[Tensor, Tensor], num_chosen: int) -> SiteTensors:
    hidden = router.hidden
    return SiteTensors(norm.weight, norm.bias, hidden.weight, hidden.bias, router.output.weight, *experts, num_chosen)
