"""Compare each fast kernel with its plain reference on this machine, forward and backward, in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mfext_kernels.grouped_linear import Backend, expert_feedforward
from mfext_kernels.routing import make_dispatch
from mfext_kernels.stickbreaking import stickbreaking_attention, stickbreaking_decode

# Sums of at most some hundreds of terms of unit size: a few hundred times the spacing of the numbers is rounding.
_ROUNDING_STEPS = 512


@dataclass(frozen=True)
class KernelCheck:
    """Largest error of an op and of its gradients, relative to the largest reference value."""

    name: str
    dtype: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed


def check_kernels() -> tuple[KernelCheck, ...]:
    """Every op in float32 and float64; random inputs of odd sizes, with an expert that nobody chose."""
    return (*_check(torch.float32), *_check(torch.float64))


def _check(dtype: torch.dtype) -> Iterator[KernelCheck]:
    draw = _drawer(torch.Generator().manual_seed(0), dtype)
    query, key, value = draw(2, 67, 2, 2, 8), draw(2, 67, 2, 8), draw(2, 67, 2, 8)
    x, up, down, gates = draw(35, 12), draw(5, 12, 7), draw(5, 7, 12), draw(35, 2)
    dispatch = make_dispatch(torch.tensor([[0, 2], [2, 4], [4, 0], [2, 0]]).repeat(9, 1)[:35], 5)

    def attention(backend: Backend) -> Tensor:
        return stickbreaking_attention(query, key, value, backend=backend)

    def decode(backend: Backend) -> Tensor:
        return stickbreaking_decode(query[:, -1], key, value, backend=backend)

    def feedforward(backend: Backend) -> Tensor:
        # Two stacks, as in a model that has grown.
        return expert_feedforward(x, [up[:2], up[2:]], [down[:2], down[2:]], gates, dispatch, backend=backend)

    for name, op, inputs in (
        ("stick-breaking attention", attention, (query, key, value)),
        ("stick-breaking decode", decode, (query, key, value)),
        ("expert feed-forward", feedforward, (x, up, down, gates)),
    ):
        allowed = _ROUNDING_STEPS * torch.finfo(dtype).eps
        yield KernelCheck(name, str(dtype).removeprefix("torch."), _error(op, inputs), allowed)


def _drawer(generator: torch.Generator, dtype: torch.dtype) -> Callable[..., Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return draw


def _error(op: Callable[[Backend], Tensor], inputs: tuple[Tensor, ...]) -> float:
    fast, plain = op("cpu"), op("reference")
    weights = torch.linspace(-1, 1, plain.numel(), dtype=plain.dtype).reshape(plain.shape)
    gradients = [torch.autograd.grad((result * weights).sum(), inputs) for result in (fast, plain)]
    pairs = [(fast.detach(), plain.detach()), *zip(*gradients, strict=True)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
