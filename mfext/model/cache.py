"""What decoding remembers: keys and values of every layer, gate states, document starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mfext.model.decoding_step import LayerWeights
from mfext.model.domain_gate import GateState
from mfext.model.graphed_step import GraphedStep
from mfext_kernels.decode_step import DecodeStep


@dataclass
class Cache:
    """Room for `capacity` positions of B sequences; grows by `forward(..., cache=cache)`.

    `keys_values` holds one (2, B, H, capacity, C) tensor per layer, heads outside positions: a step's products then
    read keys and values where they lie. `starts_B`: the absolute index where each row's current document began, None
    where all began at 0; `gates`: one state per gated generation; `weights` or `compiled`: what a decoding step
    of one sequence prepares at its first token; `rotations` (2, capacity, C): a dense model's cosines and sines;
    `steps`: forwards of one new token so far; `graphed`: a GPU's recorded step. While that is recorded, `filled_1`
    holds the number of filled positions on the device, and all of the cache's room is read.
    """

    keys_values: list[Tensor]
    starts_B: Tensor | None = None
    length: int = 0
    gates: dict[int, GateState] = field(default_factory=dict)
    weights: tuple[LayerWeights, ...] | None = None
    compiled: DecodeStep | None = None
    rotations: Tensor | None = None
    steps: int = 0
    graphed: GraphedStep | None = None
    filled_1: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.keys_values[0].shape[3]

    def extend(self, layer: int, k_BTHC: Tensor, v_BTHC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer; return all keys and values so far: views (B, S, H, C)."""
        # Indexed, not unbound: autograd forbids writing through the views of one unbind.
        k_BSHC, v_BSHC = (self.keys_values[layer][which].transpose(1, 2) for which in (0, 1))
        if self.filled_1 is not None:
            return k_BSHC.index_copy_(1, self.filled_1, k_BTHC), v_BSHC.index_copy_(1, self.filled_1, v_BTHC)
        first, length = self.length, k_BTHC.shape[1]
        k_BSHC.narrow(1, first, length).copy_(k_BTHC)
        v_BSHC.narrow(1, first, length).copy_(v_BTHC)
        return k_BSHC.narrow(1, 0, first + length), v_BSHC.narrow(1, 0, first + length)
