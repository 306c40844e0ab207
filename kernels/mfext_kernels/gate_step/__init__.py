"""One more token of several sequences through a domain gate, in one call of compiled code: gate_step.c.

In torch a gate takes 35 calls a token, as long as several layers of a compiled decoding step. The caller has the
equations in torch, and takes them where there is no compiler (native.py).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfext_kernels.native import Source

SOURCE = Source(Path(__file__).with_name("gate_step.c"))
available, explain = SOURCE.available, SOURCE.explain
POINTERS, SIZES = 8, 6  # of Gate in gate_step.c


class _Gate(ctypes.Structure):
    _fields_ = (
        *((f"tensor_{number}", ctypes.c_void_p) for number in range(POINTERS)),
        *((f"size_{number}", ctypes.c_int32) for number in range(SIZES)),
    )


@dataclass(frozen=True)
class GateTensors:
    """A gate's embedding (V, E); convolution (C, E*W), its input (E, W) flattened, and bias (C); hidden layer (H, M*C)
    and bias (H); output (1, H) and bias (1); decays (M), the first of them 1."""

    embedding: Tensor
    convolution: Tensor
    convolution_bias: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    output: Tensor
    output_bias: Tensor
    decays: Tensor

    def all(self) -> tuple[Tensor, ...]:
        """In the order of gate_step.c."""
        layers = (self.convolution, self.convolution_bias, self.hidden, self.hidden_bias, self.output, self.output_bias)
        return (self.embedding, *layers, self.decays)


def applies(gate: GateTensors, input_ids_B: Tensor) -> bool:
    """Whether such a gate goes this way: float32 on the CPU, contiguous, without gradients or autocast."""
    plain = all(
        each.dtype == torch.float32 and each.device.type == "cpu" and each.is_contiguous() for each in gate.all()
    )
    ids = input_ids_B.dtype == torch.int64 and input_ids_B.device.type == "cpu"
    return plain and ids and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")) and available()


def gate_step(
    gate: GateTensors, input_ids_B: Tensor, reach_B: Tensor, tail_BWE: Tensor, sums_MBC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B), and tail (B, W-1, E) and sums (M, B, C) after these tokens; what is given stays as it is.

    `reach_B`: how many tokens of its document came before each, negative for padding. Raises IndexError for an id
    outside the vocabulary.
    """
    given = [each.contiguous() for each in (tail_BWE, sums_MBC, input_ids_B, reach_B)]
    made = (given[0].new_empty(len(input_ids_B)), torch.empty_like(given[0]), torch.empty_like(given[1]))
    (num_words, width), window = gate.embedding.shape, tail_BWE.shape[1] + 1
    channels, num_hidden, num_means = len(gate.convolution), len(gate.hidden), len(gate.decays)
    sizes = (num_words, width, window, channels, num_hidden, num_means)
    described = _Gate(*(each.data_ptr() for each in gate.all()), *sizes)
    room = torch.empty(width * window + (1 + num_means) * channels + num_hidden)
    call = SOURCE.function("mfext_gate_step", (ctypes.c_void_p,) * 9 + (ctypes.c_int64,), ctypes.c_int64)
    pointers = (*(each.data_ptr() for each in (*made, *given)), ctypes.addressof(described), room.data_ptr())
    if call(*pointers, len(input_ids_B)):
        raise IndexError(f"input_ids_B: must be from 0 to {num_words - 1}")
    return made
