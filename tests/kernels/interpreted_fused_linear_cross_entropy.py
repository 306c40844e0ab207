"""The cross-entropy kernel in Triton's interpreter, against the float64 reference.

Run by test_triton_interpreter.py in a process of its own; by hand: TRITON_INTERPRET=1 pytest <this file>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mfext_kernels.fused_linear_cross_entropy import fused_linear_cross_entropy
from mfext_kernels.fused_linear_cross_entropy import triton as kernels
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance


@pytest.fixture(autouse=True)
def _poisoned_and_cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every new buffer holds NaN until it is written; chunks of 4 tokens."""
    monkeypatch.setattr(kernels, "ELEMENTS", 1)
    monkeypatch.setattr(kernels, "FEWEST_TOKENS", 4)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::3] = -100
    return [torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)], targets


def op(targets: Tensor, backend: str) -> Callable[..., Tensor]:
    return lambda x, weight: fused_linear_cross_entropy(x, weight, targets, backend)


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 1, 1), (1, 3, 7), (9, 5, 16), (13, 8, 45)])
def test_kernel_and_reference_agree(tokens: int, width: int, vocabulary: int) -> None:
    inputs, targets = inputs_of(tokens, width, vocabulary, torch.float32)
    fast = forward_and_gradients(op(targets, "triton"), inputs)
    slow = forward_and_gradients(op(targets, "reference"), [each.double() for each in inputs])
    assert_same(fast, slow, relative_tolerance(torch.float32))


def test_fp16_stays_within_its_roundings() -> None:
    inputs, targets = inputs_of(20, 8, 30, torch.float16)
    inputs[0] = inputs[0] * 0.25
    fast = forward_and_gradients(op(targets, "triton"), inputs)
    slow = forward_and_gradients(op(targets, "reference"), [each.double() for each in inputs])
    assert_same(fast, slow, 4 * torch.finfo(torch.float16).eps)


def test_logits_of_hundreds_do_not_overflow_and_all_ignored_give_zero_gradients() -> None:
    inputs, targets = inputs_of(12, 4, 40, torch.float32)
    inputs[0] = inputs[0] * 1e3
    fast = forward_and_gradients(op(targets, "triton"), inputs)
    slow = forward_and_gradients(op(targets, "reference"), [each.double() for each in inputs])
    assert_same(fast, slow, 1e-4)
    loss, *grads = forward_and_gradients(op(torch.full_like(targets, -100), "triton"), inputs)
    assert loss.isnan() and all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_without_gradients_the_same_loss_comes_out() -> None:
    (x, weight), targets = inputs_of(7, 4, 20, torch.float32)
    with torch.no_grad():
        loss = fused_linear_cross_entropy(x.requires_grad_(), weight, targets, "triton")
    assert not loss.requires_grad
    assert_same(
        [loss], [op(targets, "reference")(x.detach().double(), weight.double())], relative_tolerance(torch.float32)
    )


def test_a_target_outside_the_vocabulary_makes_the_loss_nan() -> None:
    """What the kernel does where nobody looked at the targets before, as on CUDA."""
    losses = kernels._step(torch.zeros(3, 20), torch.tensor([0, 20, -7]), False)
    assert losses.isnan().tolist() == [False, True, True]


def test_a_kernel_one_per_cent_wrong_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels._step
    monkeypatch.setattr(kernels, "_step", lambda logits, targets, gradient: right(logits, targets, gradient) * 1.01)
    inputs, targets = inputs_of(9, 5, 16, torch.float32)
    slow = forward_and_gradients(op(targets, "reference"), [each.double() for each in inputs])
    with pytest.raises(AssertionError, match="output: off by"):
        assert_same(forward_and_gradients(op(targets, "triton"), inputs), slow, relative_tolerance(torch.float32))

    def wrong_gradient(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        losses = right(logits, targets, gradient)
        logits.mul_(1.01)
        return losses

    monkeypatch.setattr(kernels, "_step", wrong_gradient)
    with pytest.raises(AssertionError, match="gradient of input 0: off by"):
        assert_same(forward_and_gradients(op(targets, "triton"), inputs), slow, relative_tolerance(torch.float32))
