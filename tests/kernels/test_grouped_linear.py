"""Expert maps: the fast version against the reference, forward and every gradient; and what is not computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfext_kernels.grouped_linear import (
    cpu,
    expert_feedforward,
    gather_linear,
    order_rows,
    scatter_linear,
    sort_rows,
)
from mfext_kernels.routing import Dispatch, make_dispatch
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance

D, F_WIDTH = 7, 5


def choose(kind: str, tokens: int, chosen: int, experts: int) -> Tensor:
    if kind == "one expert":
        return torch.full((tokens, chosen), experts - 1)
    scores = torch.rand(tokens, experts)
    if kind == "empty experts":
        scores[:, 1 : 1 + experts // 2] = -1
    return scores.topk(chosen, dim=-1).indices


def stacks(sizes: tuple[int, ...], rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(size, rows, columns, dtype=dtype) for size in sizes]


def every_op(num: int, dispatch: Dispatch, backend: str | None):
    """(name, op over flat inputs) of the three ops with `num` stacks."""
    return {
        "gather": lambda x, *w: gather_linear(x, w[:num], dispatch, backend),
        "scatter": lambda x, g, *w: scatter_linear(x, w[:num], g, dispatch, backend),
        "feedforward": lambda x, g, *w: expert_feedforward(x, w[:num], w[num:], g, dispatch, backend),
        "permutes": lambda x: sort_rows(order_rows(x, dispatch, backend) * 2, dispatch, backend),
    }


def inputs_of(name: str, dispatch: Dispatch, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    tokens, rows = dispatch.num_tokens, dispatch.num_tokens * dispatch.num_chosen
    gates = torch.rand(tokens, dispatch.num_chosen, dtype=dtype)
    up, down = stacks(sizes, D, F_WIDTH, dtype), stacks(sizes, F_WIDTH, D, dtype)
    return {
        "gather": [torch.randn(tokens, D, dtype=dtype), *up],
        "scatter": [torch.randn(rows, F_WIDTH, dtype=dtype), gates, *down],
        "feedforward": [torch.randn(tokens, D, dtype=dtype), gates, *up, *down],
        "permutes": [torch.randn(rows, F_WIDTH, dtype=dtype)],
    }[name]


OPS = ["gather", "scatter", "feedforward", "permutes"]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(6,), (3, 1, 2)])
@pytest.mark.parametrize("kind", ["spread", "empty experts", "one expert"])
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (1, 2), (13, 3), (130, 2)])
def test_fast_and_reference_agree(
    tokens: int, chosen: int, kind: str, sizes: tuple[int, ...], dtype: torch.dtype, name: str
) -> None:
    dispatch = make_dispatch(choose(kind, tokens, chosen, sum(sizes)), sum(sizes))
    inputs = inputs_of(name, dispatch, sizes, dtype)
    fast = forward_and_gradients(every_op(len(sizes), dispatch, None)[name], inputs)
    slow = forward_and_gradients(every_op(len(sizes), dispatch, "reference")[name], [each.double() for each in inputs])
    assert_same(fast, slow, relative_tolerance(dtype))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck_in_float64(backend: str, name: str) -> None:
    dispatch = make_dispatch(choose("empty experts", 5, 2, 5), 5)
    inputs = [tensor.requires_grad_() for tensor in inputs_of(name, dispatch, (3, 2), torch.float64)]
    assert torch.autograd.gradcheck(every_op(2, dispatch, backend)[name], inputs)


@pytest.mark.parametrize("name", ["gather", "scatter", "feedforward"])
def test_bf16_stays_within_its_rounding_of_float64(name: str) -> None:
    dispatch = make_dispatch(choose("spread", 40, 2, 4), 4)
    inputs = [tensor.bfloat16() for tensor in inputs_of(name, dispatch, (4,), torch.float32)]
    fast = forward_and_gradients(every_op(1, dispatch, None)[name], inputs)
    slow = forward_and_gradients(every_op(1, dispatch, "reference")[name], [each.double() for each in inputs])
    assert all(tensor.dtype == torch.bfloat16 for tensor in fast)
    # Two products with a rounding to bf16 after each, and gates rounded between: four roundings.
    assert_same(fast, slow, 4 * torch.finfo(torch.bfloat16).eps)


def test_autocast_computes_in_bf16_and_gives_fp32_weights_fp32_gradients() -> None:
    dispatch = make_dispatch(choose("spread", 20, 2, 4), 4)
    x, gates, up, down = inputs_of("feedforward", dispatch, (4,), torch.float32)
    up.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = expert_feedforward(x, [up], [down], gates, dispatch)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert up.grad is not None and up.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["gather", "scatter", "feedforward"])
def test_non_contiguous_inputs_and_stride_0_gradients_agree(name: str) -> None:
    dispatch = make_dispatch(choose("spread", 11, 2, 4), 4)
    inputs = [torch.cat([t, t], dim=-1)[..., ::2].detach() for t in inputs_of(name, dispatch, (1, 3), torch.float64)]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    results = []
    for backend in ("cpu", "reference"):
        out = every_op(2, dispatch, backend)[name](*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert_same(*results, relative_tolerance(torch.float64))


class _CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket is torch.ops.aten.mm
        return out


@pytest.mark.parametrize("name", ["gather", "scatter", "feedforward"])
def test_a_frozen_stack_costs_no_weight_gradient(name: str) -> None:
    dispatch = make_dispatch(torch.arange(10).view(5, 2), 10)
    inputs = inputs_of(name, dispatch, (7, 3), torch.float64)
    counts = {}
    for trained in ((True, True), (False, True), (False, False)):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        for leaf in leaves[1:]:
            if leaf.dim() == 3:
                leaf.requires_grad_(trained[0] if leaf.shape[0] == 7 else trained[1])
        out = every_op(2, dispatch, None)[name](*leaves)
        with _CountProducts() as spy:
            out.backward(torch.ones_like(out))
        counts[trained] = spy.products
        for leaf in leaves:
            assert (leaf.grad is not None) == leaf.requires_grad
    products_per_expert = 2 if name == "feedforward" else 1
    assert counts[True, True] - counts[False, True] == 7 * products_per_expert
    assert counts[False, True] - counts[False, False] == 3 * products_per_expert


def test_an_input_without_gradient_costs_none() -> None:
    dispatch = make_dispatch(torch.arange(6).view(3, 2), 6)
    x, gates, up, down = inputs_of("feedforward", dispatch, (6,), torch.float64)
    counts = []
    for needed in (True, False):
        leaves = x.detach().requires_grad_(needed), gates, up.requires_grad_(), down.requires_grad_()
        out = expert_feedforward(leaves[0], [leaves[2]], [leaves[3]], leaves[1], dispatch)
        with _CountProducts() as spy:
            out.backward(torch.ones_like(out))
        counts.append(spy.products)
    assert counts[0] - counts[1] == 6


def test_permuting_the_experts_changes_nothing() -> None:
    experts = choose("spread", 30, 2, 6)
    permutation = torch.randperm(6)
    dispatch = make_dispatch(experts, 6)
    moved = make_dispatch(permutation.argsort()[experts], 6)
    x, gates, up, down = inputs_of("feedforward", dispatch, (6,), torch.float64)
    one = expert_feedforward(x, [up], [down], gates, dispatch)
    other = expert_feedforward(x, [up[permutation]], [down[permutation]], gates, moved)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_several_stacks_give_the_bits_of_one() -> None:
    dispatch = make_dispatch(choose("spread", 30, 2, 6), 6)
    x, gates, up, down = inputs_of("feedforward", dispatch, (6,), torch.float32)
    one = expert_feedforward(x, [up], [down], gates, dispatch)
    many = expert_feedforward(x, up.split([2, 3, 1]), down.split([2, 3, 1]), gates, dispatch)
    assert torch.equal(one, many)


def test_gelu_through_sigmoid_is_torch_tanh_gelu_and_its_derivative() -> None:
    for dtype in (torch.float64, torch.float32):
        x = torch.cat([torch.linspace(-30, 30, 4001, dtype=dtype), torch.tensor([0.0, -1e4, 1e4], dtype=dtype)])
        active, slope = cpu.gelu_with_slope(x, slope=True)
        exact = x.double().requires_grad_()
        expected = F.gelu(exact, approximate="tanh")
        expected.sum().backward()
        assert slope is not None
        tolerance = relative_tolerance(dtype)
        torch.testing.assert_close(active.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(slope.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_no_tokens_at_all_give_empty_rows_and_zero_gradients() -> None:
    dispatch = make_dispatch(torch.empty(0, 2, dtype=torch.long), 4)
    for name in OPS:
        inputs = inputs_of(name, dispatch, (4,), torch.float32)
        out, *grads = forward_and_gradients(every_op(1, dispatch, None)[name], inputs)
        assert out.shape[0] == 0
        assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_a_kernel_one_percent_wrong_fails_the_comparison() -> None:
    dispatch = make_dispatch(choose("spread", 13, 2, 4), 4)
    right = forward_and_gradients(
        every_op(1, dispatch, None)["feedforward"], inputs_of("feedforward", dispatch, (4,), torch.float32)
    )
    for wrong_part in range(len(right)):
        wrong = [tensor * 1.01 if part == wrong_part else tensor for part, tensor in enumerate(right)]
        with pytest.raises(AssertionError, match="off by"):
            assert_same(wrong, right, relative_tolerance(torch.float32))


def test_wrong_inputs_are_named() -> None:
    dispatch = make_dispatch(choose("spread", 3, 2, 4), 4)
    x, gates, up, down = inputs_of("feedforward", dispatch, (4,), torch.float32)
    with pytest.raises(ValueError, match="3 experts in 1 stacks, but the dispatch names 4"):
        gather_linear(x, [up[:3]], dispatch)
    with pytest.raises(ValueError, match="each stack must be"):
        gather_linear(x[:, :4], [up], dispatch)
    with pytest.raises(ValueError, match="3 rows for this dispatch"):
        gather_linear(x[:2], [up], dispatch)
    with pytest.raises(ValueError, match="gates_NK"):
        expert_feedforward(x, [up], [down], gates[:2], dispatch)
    with pytest.raises(ValueError, match="same stacks"):
        expert_feedforward(x, [up], list(down.split([1, 3])), gates, dispatch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_without_gradients_the_same_values_come_out(tokens: int, name: str, dtype: torch.dtype) -> None:
    dispatch = make_dispatch(choose("spread", tokens, 3, 6), 6)
    inputs = [tensor.to(dtype) for tensor in inputs_of(name, dispatch, (4, 2), torch.float64)]
    with torch.no_grad():
        fast = every_op(2, dispatch, None)[name](*inputs)
        slow = every_op(2, dispatch, "reference")[name](*(tensor.double() for tensor in inputs))
    tolerance = 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else relative_tolerance(dtype)
    assert_same([fast], [slow], tolerance)
