"""One new token of one or several sequences through a model, from ids to logits, in one call of compiled code.

A decoding step in torch is bound by its calls: 63 operations a layer took 1.9 of 3 ms. Here a step is one call: C
compiled at first use with the system's compiler, float32 on the CPU. Sequences that chose the same expert pass it
together, so its weights are read once a step; generations behind gates add theirs on the rows they are open on. It
reads weights where they lie, so a weight changed in place is seen. Where it cannot be built the caller takes its torch
path; `explain()` says why.

The head is a second call, shared out among threads where it is large; its bits do not depend on how many.

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

from mfext_kernels.native import Source, in_parts

SOURCE = Source(Path(__file__).with_name("decode_step.c"))
available, explain = SOURCE.available, SOURCE.explain
HEAD_PART = 2**22  # numbers of a head that are worth a thread's while


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


@dataclass(frozen=True)
class GrownEnds:
    """What a gated generation adds to embedding and head (V, D), and to the last norm."""

    norm: tuple[Tensor, Tensor] | None
    embedding: Change | None
    head: Change | None


@dataclass(frozen=True)
class EndTensors:
    """What lies before the first layer and behind the last: embedding (V, D), norm (D), (D), and head (V, D)."""

    norm: tuple[Tensor, Tensor]
    embedding: Tensor
    head: Tensor
    grown: tuple[GrownEnds, ...] = ()


_PAIR = ctypes.c_void_p * 2


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
        *((name, _PAIR) for name in ("weights", "biases", "cache")),
        ("grown", ctypes.POINTER(_Grown)),
    )


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("vocabulary", "num_layers", "num_generations", "d_model", "num_heads")),
        *((name, ctypes.c_int32) for name in ("d_head", "d_router", "capacity", "widest", "most_chosen")),
        ("eps", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "position")),
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "gates")),
    )


class DecodeStep:
    """The step of one model with one cache, on the weights the model had when it was made.

    A weight changed in place is seen; a parameter replaced by another tensor is not: begin a new cache then.
    """

    def __init__(self, layers: Sequence[LayerTensors], ends: EndTensors, eps: float) -> None:
        first = layers[0]
        _, rows, heads, capacity, width = first.keys_values.shape
        sites = [site for layer in layers for site in _sites(layer)]
        # Aliases of the storage itself: a parameter given other data meanwhile leaves ours alive.
        self._storages = [tensor.detach() for tensor in _tensors(layers, ends)]
        self._layers = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        self._ends = _ends(ends)
        assert first.attention.experts is not None and first.attention.router is not None
        (vocabulary, d_model), d_router = ends.embedding.shape, first.attention.router[0].shape[0]
        ranks = [change[1].shape[0] for change in _changes(layers, ends) if len(change) == 2]
        widest = max(heads * width, *(site.width for site in sites), *ranks)
        most = max(site.num_chosen for site in sites)
        experts = max(site.num_experts for site in sites)
        counts = (vocabulary, len(layers), len(first.grown), d_model, heads, width, d_router, capacity)
        self._shape = _Shape(*counts, widest, most, eps)
        self._normed = torch.empty(rows, d_model)
        self._scratch = torch.empty(rows * (d_model + 2 * widest + d_router + experts + 2 * most))
        self._numbers = torch.empty(2 * rows * most + experts + 1, dtype=torch.int32)
        self._step = SOURCE.function("mfext_decode_step", (ctypes.c_void_p,) * 7, ctypes.c_int64)
        self._head = SOURCE.function("mfext_decode_head", (ctypes.c_void_p,) * 6 + (ctypes.c_int64,) * 2)
        self._fixed = tuple(ctypes.addressof(each) for each in (self._layers, self._ends, self._shape))
        self._room = self._normed.data_ptr(), self._scratch.data_ptr(), self._numbers.data_ptr()

    def __call__(
        self, ids_B: Tensor, position: int, starts_B: Tensor | None = None, gates_GB: Tensor | None = None
    ) -> Tensor:
        """Logits (B, V) of one new token a sequence, of which a cache of `position` positions came before.

        A row's keys before its start are not seen; None: every row sees all of its own. `gates_GB` (float32, in
        [0, 1]): how far each generation is open on each row; None: every one is closed. Raises ValueError for gates of
        another number of generations than the step was made for, IndexError for an id outside the vocabulary.
        """
        if gates_GB is not None and gates_GB.shape != (self._shape.num_generations, len(ids_B)):
            made_for = f"{self._shape.num_generations} generations of {len(ids_B)} rows"
            raise ValueError(f"gates_GB: of shape {tuple(gates_GB.shape)}, for {made_for}: begin a new cache")
        ids = ids_B.long().contiguous()
        starts = None if starts_B is None else starts_B.to(torch.int32).contiguous()
        gates = None if gates_GB is None else gates_GB.contiguous()
        pointers = (None if each is None else each.data_ptr() for each in (ids, starts, gates))
        step = _Step(len(ids), position, *pointers)
        if self._step(*self._fixed, ctypes.addressof(step), *self._room):
            raise IndexError(f"ids_B: must be from 0 to {self._shape.vocabulary - 1}")
        vocabulary, d_model = self._shape.vocabulary, self._shape.d_model
        logits_BV = self._normed.new_empty(len(ids), vocabulary)

        def head(first: int, last: int) -> None:
            """Of every four tokens from `first` on."""
            between = self._normed.new_empty(self._shape.widest)
            pointers = logits_BV.data_ptr(), self._room[0], between.data_ptr()
            self._head(*self._fixed[1:], ctypes.addressof(step), *pointers, 4 * first, min(4 * last, vocabulary))

        in_parts(-(-vocabulary // 4), head, 1 + vocabulary * d_model // HEAD_PART)
        return logits_BV


def fits(layers: Sequence[LayerTensors], ends: EndTensors) -> bool:
    """Whether every tensor is what the compiled code reads: float32, contiguous, on the CPU."""
    return all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
        for tensor in _tensors(layers, ends)
    )


def _sites(layer: LayerTensors) -> list[SiteTensors]:
    grown = [site for each in layer.grown for site in (each.attention, each.feedforward)]
    return [layer.attention, layer.feedforward, *grown]


def _changes(layers: Sequence[LayerTensors], ends: EndTensors) -> list[Change]:
    of_layers = [change for layer in layers for each in layer.grown for change in (each.key, each.value)]
    of_ends = [change for each in ends.grown for change in (each.embedding, each.head)]
    return [change for change in of_layers + of_ends if change is not None]


def _tensors(layers: Sequence[LayerTensors], ends: EndTensors) -> list[Tensor]:
    sites = [site for layer in layers for site in _sites(layer)]
    parts: list[tuple[Tensor, ...] | None] = [
        (ends.embedding, ends.head),
        ends.norm,
        *(each.norm for each in ends.grown),
    ]
    parts += [part for site in sites for part in (site.norm, site.router, site.experts)]
    parts += [*_changes(layers, ends), *(layer.projections for layer in layers)]
    return [tensor for part in parts for tensor in part or ()] + [layer.keys_values for layer in layers]


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
        *(_Grown(_both_sites(each), _both_changes(each.key, each.value)) for each in layer.grown)
    )
    weights = [tensor.data_ptr() for tensor in layer.projections] if layer.projections else [None] * 4
    cache = _PAIR(layer.keys_values[0].data_ptr(), layer.keys_values[1].data_ptr())
    return _Layer(_both_sites(layer), _PAIR(*weights[::2]), _PAIR(*weights[1::2]), cache, grown)


def _ends(ends: EndTensors) -> _Layer:
    """As a layer of one norm and no experts: decode_step.c says which is what."""

    def only(norm: tuple[Tensor, Tensor] | None) -> ctypes.Array[_Site]:
        return (_Site * 2)(_site(SiteTensors(norm, None, None, 0)))

    grown = (_Grown * len(ends.grown))(
        *(_Grown(only(each.norm), _both_changes(each.embedding, each.head)) for each in ends.grown)
    )
    weights = _PAIR(ends.embedding.data_ptr(), ends.head.data_ptr())
    return _Layer(only(ends.norm), weights, _PAIR(), _PAIR(), grown)


def _both_changes(first: Change | None, second: Change | None) -> ctypes.Array[_Change]:
    return (_Change * 2)(_change(first), _change(second))
