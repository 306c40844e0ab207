"""The expert maps' Triton kernels in Triton's interpreter, against the float64 reference.

Run by test_triton_interpreter.py in a process of its own; by hand: TRITON_INTERPRET=1 pytest <this file>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfext_kernels.grouped_linear import expert_feedforward, gather_linear, order_rows, scatter_linear, sort_rows
from mfext_kernels.grouped_linear import triton as kernels
from mfext_kernels.routing import Dispatch, make_dispatch
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance

D, F_WIDTH = 21, 18
OPS = ["gather", "scatter", "feedforward"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every new buffer holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def choose(kind: str, tokens: int, chosen: int, experts: int) -> Tensor:
    if kind == "one expert":
        return torch.full((tokens, chosen), experts - 1)
    scores = torch.rand(tokens, experts)
    if kind == "empty experts":
        scores[:, 1 : 1 + experts // 2] = -1
    return scores.topk(chosen, dim=-1).indices


def op_of(name: str, num: int, dispatch: Dispatch, backend: str) -> Callable[..., Tensor]:
    return {
        "gather": lambda x, *w: gather_linear(x, w[:num], dispatch, backend),
        "scatter": lambda x, g, *w: scatter_linear(x, w[:num], g, dispatch, backend),
        "feedforward": lambda x, g, *w: expert_feedforward(x, w[:num], w[num:], g, dispatch, backend),
    }[name]


def inputs_of(
    name: str, dispatch: Dispatch, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    tokens, rows = dispatch.num_tokens, dispatch.num_tokens * dispatch.num_chosen
    gates = torch.rand(tokens, dispatch.num_chosen)
    up = [torch.randn(size, D, F_WIDTH) * D**-0.5 for size in sizes]
    down = [torch.randn(size, F_WIDTH, D) * F_WIDTH**-0.5 for size in sizes]
    inputs = {
        "gather": [torch.randn(tokens, D), *up],
        "scatter": [torch.randn(rows, F_WIDTH), gates, *down],
        "feedforward": [torch.randn(tokens, D), gates, *up, *down],
    }[name]
    return [each.to(dtype) for each in inputs]


def compare(name: str, dispatch: Dispatch, sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    inputs = inputs_of(name, dispatch, sizes, dtype)
    fast = forward_and_gradients(op_of(name, len(sizes), dispatch, "triton"), inputs)
    assert all(tensor.dtype == dtype for tensor in fast)
    exact = [each.double() for each in inputs]
    assert_same(fast, forward_and_gradients(op_of(name, len(sizes), dispatch, "reference"), exact), tolerance)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["spread", "empty experts", "one expert"])
@pytest.mark.parametrize(("tokens", "chosen", "sizes"), [(1, 1, (6,)), (29, 3, (3, 1, 2))])
def test_kernels_and_reference_agree(tokens: int, chosen: int, kind: str, sizes: tuple[int, ...], name: str) -> None:
    dispatch = make_dispatch(choose(kind, tokens, chosen, sum(sizes)), sum(sizes))
    compare(name, dispatch, sizes, torch.float32, relative_tolerance(torch.float32))


@pytest.mark.parametrize("name", OPS)
def test_fp16_stays_within_its_roundings_of_float64(name: str) -> None:
    dispatch = make_dispatch(choose("spread", 20, 2, 4), 4)
    compare(name, dispatch, (1, 3), torch.float16, 4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("name", OPS)
def test_non_contiguous_inputs_and_stride_0_gradients_agree(name: str) -> None:
    dispatch = make_dispatch(choose("spread", 11, 2, 4), 4)
    inputs = [torch.cat([t, t], dim=-1)[..., ::2].detach() for t in inputs_of(name, dispatch, (1, 3))]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    results = []
    for backend in ("triton", "reference"):
        out = op_of(name, 2, dispatch, backend)(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert_same(*results, relative_tolerance(torch.float32))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["spread", "empty experts", "one expert"])
def test_weights_gradients_summed_by_the_library_agree(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library_sums", lambda weight: True)
    monkeypatch.setattr(kernels, "weights_kernel", None)
    for width, multiple in (("D", 24), ("F_WIDTH", 16)):  # of 16 bytes, which the library asks of rows
        monkeypatch.setitem(globals(), width, multiple)
    dispatch = make_dispatch(choose(kind, 29, 3, 6), 6)
    compare(name, dispatch, (6,), torch.float32, relative_tolerance(torch.float32))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("name", OPS)
def test_a_frozen_stack_and_a_frozen_input_launch_no_gradient_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {each: Counted(getattr(kernels, each)) for each in ("weights_kernel", "rows_kernel", "back_kernel")}
    for each, kernel in counted.items():
        monkeypatch.setattr(kernels, each, kernel)
    dispatch = make_dispatch(torch.arange(10).view(5, 2), 10)
    inputs = inputs_of(name, dispatch, (7, 3))
    for trained, input_too in ((True, True), (False, True), (True, False)):
        leaves = [each.detach().requires_grad_(each.dim() == 3 and (trained or each.shape[0] == 3)) for each in inputs]
        leaves[0].requires_grad_(input_too)
        out = op_of(name, 2, dispatch, "triton")(*leaves)
        for kernel in counted.values():
            kernel.launches = 0
        out.backward(torch.ones_like(out))
        assert all((leaf.grad is not None) == leaf.requires_grad for leaf in leaves)
        products = 2 if name == "feedforward" else 1
        assert counted["weights_kernel"].launches == products * (2 if trained else 1)
        assert counted["back_kernel"].launches == (name != "gather")
        below = name == "feedforward"  # its first weights lie below its second
        assert counted["rows_kernel"].launches == 2 * (input_too or below) + 2 * (input_too and below)


def test_only_the_gates_gradient_is_right_without_the_others() -> None:
    dispatch = make_dispatch(choose("spread", 9, 2, 4), 4)
    for name in ("scatter", "feedforward"):
        x, gates, *weights = inputs_of(name, dispatch, (4,))
        results = []
        for backend in ("triton", "reference"):
            leaf = gates.clone().requires_grad_()
            op_of(name, 1, dispatch, backend)(x, leaf, *weights).square().sum().backward()
            results.append([leaf.grad])
        assert_same(*results, relative_tolerance(torch.float32))


@pytest.mark.parametrize("name", OPS)
def test_without_gradients_the_same_values_come_out(name: str) -> None:
    dispatch = make_dispatch(choose("spread", 20, 3, 6), 6)
    inputs = inputs_of(name, dispatch, (4, 2))
    with torch.no_grad():
        fast = op_of(name, 2, dispatch, "triton")(*inputs)
        slow = op_of(name, 2, dispatch, "reference")(*(each.double() for each in inputs))
    assert_same([fast], [slow], relative_tolerance(torch.float32))


def test_several_stacks_and_a_second_run_give_the_bits_of_one() -> None:
    dispatch = make_dispatch(choose("spread", 30, 2, 6), 6)
    inputs = inputs_of("feedforward", dispatch, (6,))
    one, again = (forward_and_gradients(op_of("feedforward", 1, dispatch, "triton"), inputs) for _ in range(2))
    assert all(torch.equal(each, other) for each, other in zip(one, again, strict=True))
    cut = [*inputs[:2], *inputs[2].split([2, 3, 1]), *inputs[3].split([2, 3, 1])]
    many = forward_and_gradients(op_of("feedforward", 3, dispatch, "triton"), cut)
    assert all(torch.equal(each, other) for each, other in zip(one[:3], many[:3], strict=True))
    assert torch.equal(one[3], torch.cat(many[3:6])) and torch.equal(one[4], torch.cat(many[6:]))


@pytest.mark.parametrize("library", [False, True])
def test_no_tokens_at_all_give_empty_rows_and_zero_gradients(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library_sums", lambda weight: library)
    dispatch = make_dispatch(torch.empty(0, 2, dtype=torch.long), 4)
    for name in OPS:
        out, *grads = forward_and_gradients(op_of(name, 1, dispatch, "triton"), inputs_of(name, dispatch, (4,)))
        assert out.shape[0] == 0
        assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_the_permutes_are_there_too() -> None:
    dispatch = make_dispatch(choose("spread", 7, 2, 4), 4)
    rows = torch.randn(14, 3)
    ordered = order_rows(rows, dispatch, "triton")
    assert torch.equal(ordered, order_rows(rows, dispatch, "reference"))
    assert torch.equal(sort_rows(ordered, dispatch, "triton"), rows)


@pytest.mark.parametrize("name", ["rows_kernel", "back_kernel", "weights_kernel"])
def test_a_kernel_one_per_cent_wrong_fails_the_comparison(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)

    class Wrong:
        """The kernel with one of its inputs 1 % too large."""

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda first, *given, **constants: right[grid](first * 1.01, *given, **constants)

    monkeypatch.setattr(kernels, name, Wrong())
    with pytest.raises(AssertionError, match="off by"):
        dispatch = make_dispatch(choose("spread", 9, 2, 4), 4)
        compare("feedforward", dispatch, (4,), torch.float32, relative_tolerance(torch.float32))
