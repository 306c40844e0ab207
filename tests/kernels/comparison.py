"""Compare two implementations of an op: forward and the gradient of every input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Op = Callable[..., Tensor]


def relative_tolerance(dtype: torch.dtype) -> float:
    """Of the largest element: rounding of some hundred accumulated terms in that dtype."""
    return 64 * torch.finfo(dtype).eps


def forward_and_gradients(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output of `op(*inputs)` and the gradients of a fixed random weighting of it, one per input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = op(*leaves)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    out.backward(weighting.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Each pair agrees within `tolerance` of the expected tensor's largest element."""
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        name = "output" if number == 0 else f"gradient of input {number - 1}"
        assert one is not None, f"{name}: missing"
        assert one.shape == other.shape, f"{name}: {tuple(one.shape)} instead of {tuple(other.shape)}"
        assert bool(torch.isfinite(one).all()), f"{name}: not finite"
        scale = float(other.abs().max()) if other.numel() else 0.0
        worst = float((one.double() - other.double()).abs().max()) if other.numel() else 0.0
        assert worst <= tolerance * scale, f"{name}: off by {worst:.3g}, allowed {tolerance * scale:.3g}"
