"""One new token of one or several sequences through every layer of a model, in one call of compiled code.

A decoding step in torch is bound by its calls: 63 operations a layer took 1.9 of 3 ms. Here a step is one call: C
compiled at first use with the system's compiler, float32 on the CPU. Sequences that chose the same expert pass it
together, so its weights are read once a step. It reads weights where they lie, so a weight changed in place is seen.
Where it cannot be built the caller takes its torch path; `explain()` says why.

Equations as in the other ops: stick-breaking attention over the cache, expert queries and outputs, feed-forward experts
with tanh-gelu, routers of kind mlp, all gates softmax probabilities over all experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfext_kernels.native import build

SOURCE = Path(__file__).with_name("decode_step.c")


@dataclass(frozen=True)
class SiteTensors:
    """One site: norm (D), router (G, D), (G), (E, G), experts (E, D, W) and (E, W, D)."""

    norm_weight: Tensor
    norm_bias: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    enter: Tensor
    leave: Tensor
    num_chosen: int


@dataclass(frozen=True)
class LayerTensors:
    """One layer: its two sites, keys' and values' weights (A, D) and biases (A), or None where keys and values are the
    layer's input; and the cache (2, B, H, capacity, C)."""

    attention: SiteTensors
    feedforward: SiteTensors
    projections: tuple[Tensor, Tensor, Tensor, Tensor] | None
    keys_values: Tensor


class _Site(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("norm_w", "norm_b", "hidden_w", "hidden_b", "output_w", "enter", "leave")
        ),
        ("num_experts", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention", _Site),
        ("feedforward", _Site),
        *((name, ctypes.c_void_p) for name in ("key_w", "key_b", "value_w", "value_b", "keys", "values")),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("num_layers", "d_model", "num_heads", "d_head", "d_router", "d_feedforward", "capacity")
        ),
        *((name, ctypes.c_int32) for name in ("attention_chosen", "feedforward_chosen")),
        ("eps", ctypes.c_float),
    )


def available() -> bool:
    """Whether the compiled step can be used here."""
    return build(SOURCE).loaded is not None


def explain() -> str:
    """What it was built with, or why it was not."""
    return build(SOURCE).reason


class DecodeStep:
    """The step of one model with one cache, on the weights the model had when it was made.

    A weight changed in place is seen; a parameter replaced by another tensor is not: begin a new cache then.
    """

    def __init__(self, layers: Sequence[LayerTensors], eps: float) -> None:
        library = build(SOURCE).loaded
        assert library is not None, "ask available() first"
        first = layers[0]
        _, rows, heads, capacity, width = first.keys_values.shape
        sites = (first.attention, first.feedforward)
        # Aliases of the storage itself: a parameter given other data meanwhile leaves ours alive.
        self._storages = [tensor.detach() for layer in layers for tensor in _tensors(layer)]
        self._layers = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        self._shape = _Shape(
            len(layers), first.attention.enter.shape[1], heads, width, sites[0].hidden_weight.shape[0],
            sites[1].enter.shape[2], capacity, sites[0].num_chosen, sites[1].num_chosen, eps,
        )  # fmt: skip
        shape = self._shape
        widest = max(heads * width, shape.d_feedforward)
        experts = max(site.enter.shape[0] for layer in layers for site in (layer.attention, layer.feedforward))
        most = max(site.num_chosen for site in sites)
        self._scratch = torch.empty(rows * (shape.d_model + 2 * widest + shape.d_router + experts + 2 * most))
        self._numbers = torch.empty(2 * rows * most + experts + 1, dtype=torch.int32)
        self._function = library.mfext_decode_step
        self._function.restype = None
        self._function.argtypes = (
            *(ctypes.c_void_p,) * 2,
            *(ctypes.c_int32,) * 2,
            *(ctypes.c_void_p,) * 4,
        )
        self._fixed = (ctypes.addressof(self._layers), ctypes.addressof(shape))

    def __call__(self, x_BD: Tensor, position: int, starts_B: Tensor | None = None) -> None:
        """Carry x (B, D, contiguous, float32), a row a sequence, through all layers in place.

        A row's keys before its start are not seen; None: every row sees all of its own.
        """
        starts = None if starts_B is None else starts_B.to(torch.int32).contiguous()
        self._function(
            *self._fixed, len(x_BD), position, None if starts is None else starts.data_ptr(), x_BD.data_ptr(),
            self._scratch.data_ptr(), self._numbers.data_ptr(),
        )  # fmt: skip


def fits(layers: Sequence[LayerTensors]) -> bool:
    """Whether every tensor is what the compiled code reads: float32, contiguous, on the CPU."""
    return all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
        for layer in layers
        for tensor in _tensors(layer)
    )


def _tensors(layer: LayerTensors) -> list[Tensor]:
    sites = [tensor for site in (layer.attention, layer.feedforward) for tensor in _site_tensors(site)]
    return [*sites, *(layer.projections or ()), layer.keys_values]


def _site_tensors(site: SiteTensors) -> tuple[Tensor, ...]:
    return (
        site.norm_weight,
        site.norm_bias,
        site.hidden_weight,
        site.hidden_bias,
        site.output_weight,
        site.enter,
        site.leave,
    )


def _layer(layer: LayerTensors) -> _Layer:
    sites = (
        _Site(*(tensor.data_ptr() for tensor in _site_tensors(site)), site.enter.shape[0])
        for site in (layer.attention, layer.feedforward)
    )
    projections = [tensor.data_ptr() for tensor in layer.projections] if layer.projections else [None] * 4
    return _Layer(*sites, *projections, layer.keys_values[0].data_ptr(), layer.keys_values[1].data_ptr())
