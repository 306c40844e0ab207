"""A quick check of every op's fast CPU version against its float64 reference, for `mfext doctor` and the bench."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mfext_kernels.fused_linear_cross_entropy import fused_linear_cross_entropy
from mfext_kernels.grouped_linear import expert_feedforward, gather_linear, order_rows, scatter_linear, sort_rows
from mfext_kernels.routing import make_dispatch
from mfext_kernels.stickbreaking import stickbreaking_attention, stickbreaking_decode

TOLERANCE = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class CheckResult:
    """One op's worst error over output and gradients, as a share of the largest element, and what is allowed."""

    name: str
    passed: bool
    worst_relative_error: float
    allowed_relative_error: float
    detail: str


def self_check() -> tuple[CheckResult, ...]:
    """Run every op forward and backward in fp32 on fresh random data and compare with float64; about 0.1 s."""
    generator = torch.Generator()
    generator.seed()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    starts = torch.tensor([[0] * 70 + [70] * 60, [5] * 130])
    dispatch = make_dispatch(torch.rand(37, 6, generator=generator)[:, :5].topk(2, dim=-1).indices, 6)
    attention_inputs = (random(2, 130, 2, 2, 8), random(2, 130, 2, 8), random(2, 130, 2, 8))
    maps = (random(4, 12, 8), random(2, 12, 8), random(4, 8, 12), random(2, 8, 12))
    gates = torch.rand(37, 2, generator=generator)
    targets = torch.randint(0, 50, (37,), generator=generator)
    return (
        _check(
            "stickbreaking_attention",
            lambda backend: lambda q, k, v: stickbreaking_attention(q, k, v, starts, backend),
            attention_inputs,
        ),
        _check(
            "stickbreaking_decode",
            lambda backend: lambda q, k, v: stickbreaking_decode(q, k, v, None, backend),
            (attention_inputs[0][:, -1], *attention_inputs[1:]),
        ),
        _check(
            "gather_linear, order_rows",
            lambda backend: lambda x, a, b: order_rows(gather_linear(x, (a, b), dispatch, backend), dispatch, backend),
            (random(37, 12), *maps[:2]),
        ),
        _check(
            "sort_rows, scatter_linear",
            lambda backend: (
                lambda x, g, a, b: scatter_linear(sort_rows(x, dispatch, backend), (a, b), g, dispatch, backend)
            ),
            (random(37, 2, 8), gates, *maps[2:]),
        ),
        _check(
            "expert_feedforward",
            lambda backend: lambda x, g, a, b, c, d: expert_feedforward(x, (a, b), (c, d), g, dispatch, backend),
            (random(37, 12), gates, *maps),
        ),
        _check(
            "fused_linear_cross_entropy",
            lambda backend: lambda x, w: fused_linear_cross_entropy(x, w, targets, backend),
            (random(37, 12), random(50, 12)),
        ),
    )


def _check(name: str, make_op: Callable[..., Callable[..., Tensor]], inputs: tuple[Tensor, ...]) -> CheckResult:
    fast = _forward_and_gradients(make_op("cpu"), inputs)
    exact = _forward_and_gradients(make_op("reference"), tuple(tensor.double() for tensor in inputs))
    errors = [
        float((one.double() - other).abs().max() / other.abs().max()) for one, other in zip(fast, exact, strict=True)
    ]
    worst = max(error if error == error else float("inf") for error in errors)
    where = errors.index(max(errors)) if worst != float("inf") else 0
    part = "the output" if where == 0 else f"the gradient of input {where - 1}"
    detail = f"{name}: worst in {part}, {worst:.1e} of its largest element (allowed {TOLERANCE:.1e})"
    return CheckResult(name, worst <= TOLERANCE, worst, TOLERANCE, detail)


def _forward_and_gradients(op: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        out = op(*leaves)
        weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad((out * weighting.to(out.dtype)).sum(), leaves)
    return [out.detach(), *grads]
