"""Head and cross-entropy in chunks: the reference's loss and gradients, without its logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfext_kernels.fused_linear_cross_entropy import cpu, fused_linear_cross_entropy
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ELEMENTS", 1)
    monkeypatch.setattr(cpu, "FEWEST_TOKENS", 4)


def inputs_of(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::3] = -100
    return [torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)], targets


def op(targets: Tensor, backend: str | None) -> Callable[..., Tensor]:
    return lambda x, weight: fused_linear_cross_entropy(x, weight, targets, backend)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(1, 1, 1), (1, 3, 7), (4, 5, 2), (13, 8, 30)])
def test_chunks_and_reference_agree(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> None:
    inputs, targets = inputs_of(tokens, width, vocabulary, dtype)
    fast = forward_and_gradients(op(targets, None), inputs)
    slow = forward_and_gradients(op(targets, "reference"), [each.double() for each in inputs])
    assert_same(fast, slow, relative_tolerance(dtype))


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_within_their_roundings(dtype: torch.dtype) -> None:
    inputs, targets = inputs_of(40, 8, 30, dtype)
    inputs[0] = inputs[0] * 0.25  # logits of order one: a logit is rounded to the inputs' dtype
    fast = forward_and_gradients(op(targets, None), inputs)
    assert [each.dtype for each in fast] == [torch.float32, dtype, dtype]
    slow = forward_and_gradients(op(targets, "reference"), [each.double() for each in inputs])
    assert_same(fast, slow, 4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("_small_chunks")
def test_gradcheck_in_float64() -> None:
    inputs, targets = inputs_of(9, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(op(targets, None), [each.requires_grad_() for each in inputs])


def test_logits_of_hundreds_do_not_overflow() -> None:
    inputs, targets = inputs_of(12, 4, 9, torch.float32)
    inputs[0] = inputs[0] * 1e3
    fast = forward_and_gradients(op(targets, None), inputs)
    slow = forward_and_gradients(op(targets, "reference"), [each.double() for each in inputs])
    assert_same(fast, slow, 1e-4)


def test_all_targets_ignored_give_nan_and_zero_gradients() -> None:
    inputs, targets = inputs_of(6, 3, 5, torch.float32)
    loss, *grads = forward_and_gradients(op(torch.full_like(targets, -100), None), inputs)
    assert loss.isnan()
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_only_what_is_trained_gets_a_gradient_and_backward_may_run_twice() -> None:
    (x, weight), targets = inputs_of(10, 4, 6, torch.float32)
    x.requires_grad_()
    loss = fused_linear_cross_entropy(x, weight, targets) * 3
    loss.backward(retain_graph=True)
    assert x.grad is not None and weight.grad is None
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with torch.no_grad():
        torch.testing.assert_close(fused_linear_cross_entropy(x, weight, targets) * 3, loss.detach())


def test_the_gradient_of_the_gradient_is_refused_instead_of_wrong() -> None:
    (x, weight), targets = inputs_of(5, 3, 4, torch.float64)
    (grad,) = torch.autograd.grad(fused_linear_cross_entropy(x.requires_grad_(), weight, targets), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_non_contiguous_inputs_agree() -> None:
    inputs, targets = inputs_of(12, 4, 9, torch.float64)
    inputs = [torch.cat([each, each], dim=1)[:, ::2] for each in inputs]
    targets = targets.repeat_interleave(2)[::2]
    fast = forward_and_gradients(op(targets, None), inputs)
    assert_same(fast, forward_and_gradients(op(targets, "reference"), inputs), relative_tolerance(torch.float64))


def test_autocast_computes_in_bf16_and_gives_fp32_weights_fp32_gradients() -> None:
    (x, weight), targets = inputs_of(12, 4, 9, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused_linear_cross_entropy(x, weight, targets)
    loss.backward()
    expected = fused_linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(loss, expected)
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_the_logits_are_never_held_at_once() -> None:
    (x, weight), targets = inputs_of(2048, 4, 3000, torch.float32)
    leaves = x.requires_grad_(), weight.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fused_linear_cross_entropy(*leaves, targets).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 2048 * 3000 * 4 / 4, f"{largest} bytes in one allocation"


def test_a_kernel_one_percent_wrong_fails_the_comparison() -> None:
    inputs, targets = inputs_of(13, 8, 30, torch.float32)
    right = forward_and_gradients(op(targets, None), inputs)
    for wrong_part in range(3):
        wrong = [tensor * 1.01 if part == wrong_part else tensor for part, tensor in enumerate(right)]
        with pytest.raises(AssertionError, match="off by"):
            assert_same(wrong, right, relative_tolerance(torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 4)}, r"must be \(N, D\) and \(V, D\), not \(6, 4\) and \(5, 3\)"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"targets_N: must be int64 of shape \(6,\)"),
        ({"targets": torch.zeros(6)}, "not torch.float32"),
        ({"targets": torch.tensor([0, 1, -100, 5, 2, 3])}, "from 0 to 4, or -100, not 5"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    (x, weight), targets = inputs_of(6, 3, 5, torch.float32)
    given = {"x": x, "weight": weight, "targets": targets, "backend": None} | change
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(given["x"], given["weight"], given["targets"], given["backend"])
