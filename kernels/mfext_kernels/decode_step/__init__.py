"""One new token of one or several sequences through every layer of a model, in one call of compiled code.

A decoding step in torch is bound by its calls: 63 operations a layer took 1.9 of 3 ms. Here a step is one call: C
compiled at first use with the system's compiler, float32 on the CPU. Sequences that chose the same expert pass it
together, so its weights are read once a step; generations behind gates add theirs on the rows they are open on. It
reads weights where they lie, so a weight changed in place is seen. Where it cannot be built the caller takes its torch
path; `explain()` says why.

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

from mfext_kernels.native import Source

SOURCE = Source(Path(__file__).with_name("decode_step.c"))
available, explain = SOURCE.available, SOURCE.explain


@dataclass(frozen=True)
class SiteTensors:
    """One site: norm (D), (D), router (G, D), (G), (E, G), experts (E, D, W) and (E, W, D); K of them chosen.

    Of a generation: what it adds to the norm, and experts of its own; None where it has none here.
    """

    norm: tuple[Tensor, Tensor] | None
    router: tuple[Tensor, Tensor, Tensor] | None
    experts: tuple[Tensor, Tensor] | None
    num_chosen: int

    @property
    def num_experts(self) -> int:
        return 0 if self.experts is None else self.experts[0].shape[0]

    @property
    def width(self) -> int:
        return 0 if self.experts is None else self.experts[0].shape[2]


# A matrix (A, D), or its factors (A, R) and (R, D).
Change = tuple[Tensor] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GrownTensors:
    """What a gated generation adds to a layer: to both sites, and to keys' and values' weights."""

    attention: SiteTensors
    feedforward: SiteTensors
    key: Change | None
    value: Change | None


@dataclass(frozen=True)
class LayerTensors:
    """One layer: its two sites, keys' and values' weights (A, D) and biases (A), or None where keys and values are the
    layer's input; the cache (2, B, H, capacity, C); and what generations add, all layers as many."""

    attention: SiteTensors
    feedforward: SiteTensors
    projections: tuple[Tensor, Tensor, Tensor, Tensor] | None
    keys_values: Tensor
    grown: tuple[GrownTensors, ...] = ()


class _Site(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("norm_w", "norm_b", "hidden_w", "hidden_b", "output_w", "enter", "leave")
        ),
        *((name, ctypes.c_int32) for name in ("num_experts", "chosen", "width")),
    )


class _Change(ctypes.Structure):
    _fields_ = (("left", ctypes.c_void_p), ("right", ctypes.c_void_p), ("rank", ctypes.c_int32))


class _Grown(ctypes.Structure):
    _fields_ = (("sites", _Site * 2), ("changes", _Change * 2))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("sites", _Site * 2),
        *((name, ctypes.c_void_p * 2) for name in ("weights", "biases", "cache")),
        ("grown", ctypes.POINTER(_Grown)),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("num_layers", "num_generations", "d_model", "num_heads", "d_head", "d_router", "capacity")
        ),
        *((name, ctypes.c_int32) for name in ("widest", "most_chosen")),
        ("eps", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "position")),
        *((name, ctypes.c_void_p) for name in ("starts", "gates")),
    )


class DecodeStep:
    """The step of one model with one cache, on the weights the model had when it was made.

    A weight changed in place is seen; a parameter replaced by another tensor is not: begin a new cache then.
    """

    def __init__(self, layers: Sequence[LayerTensors], eps: float) -> None:
        first = layers[0]
        _, rows, heads, capacity, width = first.keys_values.shape
        sites = [site for layer in layers for site in _sites(layer)]
        # Aliases of the storage itself: a parameter given other data meanwhile leaves ours alive.
        self._storages = [tensor.detach() for layer in layers for tensor in _tensors(layer)]
        self._layers = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        assert first.attention.experts is not None and first.attention.router is not None
        d_model, d_router = first.attention.experts[0].shape[1], first.attention.router[0].shape[0]
        widest = max(heads * width, *(site.width for site in sites))
        most = max(site.num_chosen for site in sites)
        experts = max(site.num_experts for site in sites)
        self._shape = _Shape(
            len(layers), len(first.grown), d_model, heads, width, d_router, capacity, widest, most, eps
        )
        self._scratch = torch.empty(rows * (d_model + 2 * widest + d_router + experts + 2 * most))
        self._numbers = torch.empty(2 * rows * most + experts + 1, dtype=torch.int32)
        self._function = SOURCE.function("mfext_decode_step", (ctypes.c_void_p,) * 6)
        self._fixed = (ctypes.addressof(self._layers), ctypes.addressof(self._shape))

    def __call__(
        self, x_BD: Tensor, position: int, starts_B: Tensor | None = None, gates_GB: Tensor | None = None
    ) -> None:
        """Carry x (B, D, contiguous, float32), a row a sequence, through all layers in place.

        A row's keys before its start are not seen; None: every row sees all of its own. `gates_GB` (float32, in
        [0, 1]): how far each generation is open on each row; None: every one is closed. Raises ValueError for gates of
        another number of generations than the step was made for.
        """
        if gates_GB is not None and gates_GB.shape != (self._shape.num_generations, len(x_BD)):
            made_for = f"{self._shape.num_generations} generations of {len(x_BD)} rows"
            raise ValueError(f"gates_GB: of shape {tuple(gates_GB.shape)}, for {made_for}: begin a new cache")
        starts = None if starts_B is None else starts_B.to(torch.int32).contiguous()
        gates = None if gates_GB is None else gates_GB.contiguous()
        pointers = (None if each is None else each.data_ptr() for each in (starts, gates))
        step = _Step(len(x_BD), position, *pointers)
        self._function(
            *self._fixed, ctypes.addressof(step), x_BD.data_ptr(), self._scratch.data_ptr(), self._numbers.data_ptr()
        )


def fits(layers: Sequence[LayerTensors]) -> bool:
    """Whether every tensor is what the compiled code reads: float32, contiguous, on the CPU."""
    return all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
        for layer in layers
        for tensor in _tensors(layer)
    )


def _sites(layer: LayerTensors) -> list[SiteTensors]:
    grown = [site for each in layer.grown for site in (each.attention, each.feedforward)]
    return [layer.attention, layer.feedforward, *grown]


def _tensors(layer: LayerTensors) -> list[Tensor]:
    sites = [
        tensor for site in _sites(layer) for part in (site.norm, site.router, site.experts) for tensor in part or ()
    ]
    changes = [tensor for grown in layer.grown for change in (grown.key, grown.value) for tensor in change or ()]
    return [*sites, *changes, *(layer.projections or ()), layer.keys_values]


def _site(site: SiteTensors) -> _Site:
    parts = ((site.norm, 2), (site.router, 3), (site.experts, 2))
    pointers = [
        pointer
        for part, count in parts
        for pointer in ([None] * count if part is None else [tensor.data_ptr() for tensor in part])
    ]
    return _Site(*pointers, site.num_experts, site.num_chosen, site.width)


def _change(change: Change | None) -> _Change:
    if change is None:
        return _Change(None, None, 0)
    right = change[1].data_ptr() if len(change) == 2 else None
    return _Change(change[0].data_ptr(), right, change[0].shape[1])


def _both_sites(layer: LayerTensors | GrownTensors) -> ctypes.Array[_Site]:
    return (_Site * 2)(_site(layer.attention), _site(layer.feedforward))


def _layer(layer: LayerTensors) -> _Layer:
    grown = (_Grown * len(layer.grown))(
        *(_Grown(_both_sites(each), (_Change * 2)(_change(each.key), _change(each.value))) for each in layer.grown)
    )
    weights = [tensor.data_ptr() for tensor in layer.projections] if layer.projections else [None] * 4
    pair = ctypes.c_void_p * 2
    cache = pair(layer.keys_values[0].data_ptr(), layer.keys_values[1].data_ptr())
    return _Layer(_both_sites(layer), pair(*weights[::2]), pair(*weights[1::2]), cache, grown)
