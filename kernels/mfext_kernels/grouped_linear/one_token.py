"""One token through its experts, without gradients: a decoding step of one sequence.

There is nothing to sort, and so little arithmetic that calls and the reading of weights are the time. A row times a
matrix is torch's weighted sum of the matrix's rows, `embedding_bag`: it reads them in the order they lie in and fetches
ahead. Two 256 x 256 matrices took it 46 us from memory where `mm` took 75 to 90 and a bare sum 37; 13 us both from
cache (one thread, MKL, 2026-11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor


def applies(x_ND: Tensor, stacks: Sequence[Tensor]) -> bool:
    """Whether this is one token on the CPU, in a dtype that sums in itself (bf16 must in fp32), with nothing to train.

    On a GPU the choice of experts would have to come to the host first, and every launch after it would wait.
    """
    return (
        x_ND.shape[0] == 1
        and x_ND.device.type == "cpu"
        and x_ND.dtype == stacks[0].dtype
        and x_ND.dtype in (torch.float32, torch.float64)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_ND, *stacks)))
        and not torch.is_autocast_enabled(x_ND.device.type)
    )


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices (D, F) of one shape by number: views, with the row numbers that a product of each takes."""

    matrices: tuple[Tensor, ...]
    index_D: Tensor
    first_1: Tensor

    @classmethod
    def of(cls, *stacks: Tensor) -> Matrices:
        """Those of the stacks (E_g, D, F), numbered consecutively."""
        index_D = torch.arange(stacks[0].shape[1], device=stacks[0].device)
        return cls(tuple(chain.from_iterable(stack.detach().unbind() for stack in stacks)), index_D, index_D[:1])

    def product(self, x_D: Tensor, number: int) -> Tensor:
        """x times one of them -> (1, F)."""
        y_1F: Tensor = torch.embedding_bag(
            self.matrices[number], self.index_D, self.first_1, False, 0, False, x_D, False
        )[0]
        return y_1F


def gather_linear(x_1D: Tensor, weights: Matrices, experts: Sequence[int]) -> Tensor:
    """x U_e of every chosen expert, in order of choice -> rows (K, F)."""
    x_D = x_1D.view(-1)
    return torch.cat([weights.product(x_D, expert) for expert in experts])


def scatter_linear(
    y_1D: Tensor, rows_KF: Tensor, weights: Matrices, experts: Sequence[int], gates: Sequence[float]
) -> Tensor:
    """y + sum over k of gate_k rows_k V_e -> (1, D)."""
    for row_F, expert, gate in zip(rows_KF.unbind(), experts, gates, strict=True):
        y_1D = torch.add(y_1D, weights.product(row_F, expert), alpha=gate)
    return y_1D


def activate(hidden_KF: Tensor) -> Tensor:
    """tanh-gelu by torch: 3 us for a token's rows, where the form through sigmoid, made for many, takes 12."""
    return F.gelu(hidden_KF, approximate="tanh")
