"""The published MoLM layout <-> ours: config keys and tensor names, with every key accounted for.

Pure mappings: no file is opened here. Source: the configuration and modules of the authors'
released code (arXiv 2306.04640), and the checkpoints published with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfext.config import ModelConfig
from mfext.errors import InputError

MODEL_TYPE = "moduleformer"

# Published key -> our field. These decide the tensors' shapes, so a config must name all of them.
_SHAPE_KEYS = {
    "vocab_size": "vocab_size",
    "n_embd": "d_model",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "att_hidden": "d_attention",
    "ffd_hidden": "d_feedforward",
    "n_att_experts": "attention_experts",
    "k_att": "attention_experts_per_token",
    "n_mlp_experts": "feedforward_experts",
    "k_mlp": "feedforward_experts_per_token",
}
# Published key -> the only value the released code can be reproduced with here (and its default there).
_FIXED_KEYS: Mapping[str, object] = {"activation_function": "gelu_new", "tie_word_embeddings": False}
# The released code builds its LayerNorms without reading `layer_norm_epsilon`: they always use this.
_LAYER_NORM_EPS = 1e-5


def is_published_config(mapping: Mapping[str, object]) -> bool:
    """Whether a config.json is of the published MoLM layout (ours says `mfext_moduleformer`)."""
    return mapping.get("model_type") == MODEL_TYPE


def config_from_published(mapping: Mapping[str, object]) -> ModelConfig:
    """Our config of a published one.

    Dropout rates and `sample_topk` only act while the authors' code trains, context lengths only size
    its masks; neither changes what the model computes, and both are left out. A missing pad token
    becomes the end-of-text token. Raises InputError naming the first key that cannot be used.
    """
    if not is_published_config(mapping):
        raise InputError(
            "not a published MoLM config", "model_type", f"is {mapping.get('model_type')!r}, expected {MODEL_TYPE!r}"
        )
    for key, expected in _FIXED_KEYS.items():
        if mapping.get(key, expected) != expected:
            raise InputError(f"unsupported value {mapping[key]!r}", key, f"only {expected!r} is supported")
    epsilon = mapping.get("layer_norm_epsilon", _LAYER_NORM_EPS)
    if epsilon != _LAYER_NORM_EPS:
        raise InputError(
            f"unsupported value {epsilon!r}", "layer_norm_epsilon", f"the published code always uses {_LAYER_NORM_EPS}"
        )
    sizes = {ours: _whole(mapping, theirs) for theirs, ours in _SHAPE_KEYS.items()}
    eos_id = _whole(mapping, "eos_token_id", 50256)
    # transformers writes null for a token that was never set.
    pad_id = eos_id if mapping.get("pad_token_id") is None else _whole(mapping, "pad_token_id")
    values: dict[str, Any] = {
        **sizes,
        "router": _choice(mapping, "gate_type", "mlp"),
        "d_router": _whole(mapping, "gating_size", 256),
        "routing_loss": _choice(mapping, "aux_loss_type", "mi"),
        "routing_loss_weight": _real(mapping, "aux_loss_weight", 0.0),
        "init": "published",
        "layer_norm_eps": _LAYER_NORM_EPS,
        "bos_id": _whole(mapping, "bos_token_id", 50256),
        "eos_id": eos_id,
        "pad_id": pad_id,
    }
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise InputError("impossible published config", "config.json", str(error)) from error


def published_config(config: ModelConfig) -> dict[str, object]:
    """The published config of ours; the inverse of `config_from_published`.

    Raises InputError for a grown model, and for one whose layers have different counts of experts: the published
    layout has no place for either.
    """
    _refuse_what_has_no_place(config)
    if config.layer_norm_eps != _LAYER_NORM_EPS:
        raise InputError(
            f"cannot export {config.layer_norm_eps!r}",
            "layer_norm_eps",
            f"the published code always uses {_LAYER_NORM_EPS}",
        )
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _SHAPE_KEYS.items()},
        **_FIXED_KEYS,
        "model_type": MODEL_TYPE,
        "architectures": ["ModuleFormerForCausalLM"],
        "gating_size": config.d_router,
        "gate_type": config.router,
        "aux_loss_type": config.routing_loss,
        "aux_loss_weight": config.routing_loss_weight,
        "layer_norm_epsilon": config.layer_norm_eps,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


def tensors_from_published(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors (names of the state dict, dtypes kept) of published ones.

    Raises InputError naming the first tensor that is missing, unknown, wrongly shaped, not
    floating point, or holds a NaN or infinity.
    """
    _refuse_what_has_no_place(config)
    converted, used = {}, set()
    for entry in _entries(config):
        if entry.published not in tensors:
            raise InputError(
                "missing tensor", entry.published, f"expected shape {entry.published_shape} by config.json"
            )
        tensor = tensors[entry.published]
        _check(entry.published, tensor, entry.published_shape)
        converted[entry.ours] = tensor.reshape(entry.our_shape)
        used.add(entry.published)
    for name in sorted(set(tensors) - used):
        if not _is_constant_buffer(name, tensors[name], config):
            raise InputError("unknown tensor", name, "no part of the model that config.json describes")
    return converted


def published_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The published tensors of ours; the inverse of `tensors_from_published`, with the same checks."""
    _refuse_what_has_no_place(config)
    converted = {}
    for entry in _entries(config):
        if entry.ours not in tensors:
            raise InputError("missing tensor", entry.ours, f"expected shape {entry.our_shape}")
        _check(entry.ours, tensors[entry.ours], entry.our_shape)
        converted[entry.published] = tensors[entry.ours].reshape(entry.published_shape)
    unknown = sorted(set(tensors) - {entry.ours for entry in _entries(config)})
    if unknown:
        raise InputError("unknown tensor", unknown[0], "no part of the model that its config describes")
    return converted


def published_name(name: str, config: ModelConfig) -> str:
    """The published name of one of our base tensors; KeyError for any other."""
    return {entry.ours: entry.published for entry in _entries(config)}[name]


@dataclass(frozen=True)
class _Entry:
    """One tensor under both names. The shapes differ in the gmm temperature alone: (1,) there, () here."""

    published: str
    ours: str
    published_shape: tuple[int, ...]
    our_shape: tuple[int, ...]


def _same(published: str, ours: str, *shape: int) -> _Entry:
    return _Entry(published, ours, shape, shape)


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    """Every tensor of a base model. Lazy, so that an absurd layer count fails at the first missing tensor."""
    d_model, vocab = config.d_model, config.vocab_size
    yield _same("transformer.wte.weight", "embedding.weight", vocab, d_model)
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        for their_norm, our_norm in (("ln_1", "attention_norm"), ("ln_2", "feedforward_norm")):
            for part in ("weight", "bias"):
                yield _same(f"{theirs}.{their_norm}.{part}", f"{ours}.{our_norm}.{part}", d_model)
        yield from _attention_entries(config, layer)
        yield from _feedforward_entries(config, layer)
    for part in ("weight", "bias"):
        yield _same(f"transformer.ln_f.{part}", f"final_norm.{part}", d_model)
    yield _same("lm_head.weight", "lm_head.weight", vocab, d_model)


def _attention_entries(config: ModelConfig, layer: int) -> Iterator[_Entry]:
    theirs, ours = f"transformer.h.{layer}.attn", f"blocks.{layer}.attention"
    experts, d_model, d_attention = config.experts("attention", layer), config.d_model, config.d_attention
    yield from _router_entries(config, f"{theirs}.q_proj.gate", f"{ours}.router", experts)
    yield _same(f"{theirs}.q_proj.experts.weight", f"{ours}.experts.query", experts, d_model, d_attention)
    yield _same(f"{theirs}.q_proj.output_experts.weight", f"{ours}.experts.output", experts, d_attention, d_model)
    if not config.identity_keys_values:
        for their_part, our_part in (("k_proj", "key"), ("v_proj", "value")):
            yield _same(f"{theirs}.{their_part}.weight", f"{ours}.{our_part}.weight", d_attention, d_model)
            yield _same(f"{theirs}.{their_part}.bias", f"{ours}.{our_part}.bias", d_attention)


def _feedforward_entries(config: ModelConfig, layer: int) -> Iterator[_Entry]:
    theirs, ours = f"transformer.h.{layer}.mlpf", f"blocks.{layer}.feedforward"
    experts, d_model, d_feedforward = config.experts("feedforward", layer), config.d_model, config.d_feedforward
    yield from _router_entries(config, f"{theirs}.gate", f"{ours}.router", experts)
    yield _same(f"{theirs}.experts.weight", f"{ours}.experts.up", experts, d_model, d_feedforward)
    yield _same(f"{theirs}.output_experts.weight", f"{ours}.experts.down", experts, d_feedforward, d_model)


def _router_entries(config: ModelConfig, theirs: str, ours: str, experts: int) -> Iterator[_Entry]:
    """Published routers are Sequentials: (linear, gelu, dropout, linear) for mlp, (linear,) for linear."""
    d_model, d_router = config.d_model, config.d_router
    if config.router == "mlp":
        yield _same(f"{theirs}.w_gate.0.weight", f"{ours}.hidden.weight", d_router, d_model)
        yield _same(f"{theirs}.w_gate.0.bias", f"{ours}.hidden.bias", d_router)
        yield _same(f"{theirs}.w_gate.3.weight", f"{ours}.output.weight", experts, d_router)
    elif config.router == "linear":
        yield _same(f"{theirs}.w_gate.0.weight", f"{ours}.output.weight", experts, d_model)
    else:
        yield _same(f"{theirs}.w_gate.weight", f"{ours}.projection.weight", d_router, d_model)
        yield _same(f"{theirs}.expert_centroids", f"{ours}.centroids", experts, d_router)
        yield _Entry(f"{theirs}.temperature", f"{ours}.temperature", (1,), ())


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError("wrong shape", name, f"{tuple(tensor.shape)}, expected {shape} by the config")
    if not tensor.is_floating_point():
        raise InputError("wrong dtype", name, f"{tensor.dtype}, expected floating point")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(
            "non-finite tensor", name, "holds a NaN or an infinity; the file is damaged or training diverged"
        )


def _is_constant_buffer(name: str, tensor: Tensor, config: ModelConfig) -> bool:
    """Whether a tensor is one of the triangular masks the released code stores with its weights."""
    for layer in range(config.num_layers):
        for suffix, diagonal in (("mask", 0), ("cum_weight", -1)):
            if name == f"transformer.h.{layer}.attn.{suffix}":
                square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
                return square and torch.equal(tensor, torch.ones_like(tensor).tril(diagonal))
    return False


def _refuse_what_has_no_place(config: ModelConfig) -> None:
    for key in ("attention_experts", "feedforward_experts"):
        counts = getattr(config, key)
        if isinstance(counts, tuple):
            raise InputError(
                "the published layout has one count of experts for all layers",
                f"{key}={list(counts)}",
                "prune with pruning.budget=per_layer, so that every layer keeps as many",
            )
    if config.generations:
        names = ", ".join(generation.name for generation in config.generations)
        raise InputError("the published layout has no place for generations", names, "detach them first")


def _whole(mapping: Mapping[str, object], key: str, default: int | None = None) -> int:
    if key not in mapping and default is None:
        raise InputError("missing key", key, "a published config must give it as a whole number")
    value = mapping.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"wrong value {value!r}", key, "must be a whole number")
    return value


def _real(mapping: Mapping[str, object], key: str, default: float) -> float:
    value = mapping.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"wrong value {value!r}", key, "must be a finite number")
    return float(value)


def _choice(mapping: Mapping[str, object], key: str, default: str) -> str:
    value = mapping.get(key, default)
    if not isinstance(value, str):
        raise InputError(f"wrong value {value!r}", key, "must be a word")
    return value
