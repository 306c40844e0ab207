"""What decoding remembers: keys and values of every layer, gate states, document starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mfext.model.domain_gate import GateState


@dataclass
class Cache:
    """Room for `capacity` positions of B sequences; grows by `forward(..., cache=cache)`.

    `keys` and `values` hold one (B, capacity, H, C) tensor per layer; `starts_B` the absolute
    index where each row's current document began; `gates` one state per gated generation.
    """

    keys: list[Tensor]
    values: list[Tensor]
    starts_B: Tensor
    length: int = 0
    gates: dict[int, GateState] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    def extend(self, layer: int, k_BTHC: Tensor, v_BTHC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; return all keys and values so far (views)."""
        end = self.length + k_BTHC.shape[1]
        self.keys[layer][:, self.length : end] = k_BTHC
        self.values[layer][:, self.length : end] = v_BTHC
        return self.keys[layer][:, :end], self.values[layer][:, :end]
