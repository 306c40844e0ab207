"""The cross-entropy kernels in Triton's interpreter, against the float64 reference.

Run by test_triton_interpreter.py in a process of its own; by hand: TRITON_INTERPRET=1 pytest <this file>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mfext_kernels import tuning
from mfext_kernels.cross_entropy import cross_entropy
from mfext_kernels.cross_entropy import triton as kernels
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every new buffer holds NaN until it is written; a row is several tiles."""
    assert tuning.pick("interpreter", "cross_entropy", 4).columns == 16
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def op(targets: Tensor, backend: str) -> Callable[..., Tensor]:
    return lambda logits: cross_entropy(logits, targets, backend)


def some_targets(tokens: int, vocabulary: int) -> Tensor:
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[1::3] = -100
    return targets


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (1, 7), (9, 16), (13, 45)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_and_reference_agree(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits, targets = (torch.randn(tokens, vocabulary) * 3).to(dtype), some_targets(tokens, vocabulary)
    fast = forward_and_gradients(op(targets, "triton"), [logits])
    assert fast[0].dtype == torch.float32 and fast[1].dtype == dtype
    slow = forward_and_gradients(op(targets, "reference"), [logits.double()])
    tolerance = relative_tolerance(dtype) if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert_same(fast, slow, tolerance)


def test_rows_of_a_wider_buffer_and_columns_of_a_transpose_are_read_where_they_lie() -> None:
    wide, targets = torch.randn(9, 64), some_targets(9, 45)
    exact = forward_and_gradients(op(targets, "reference"), [wide[:, :45].double()])
    for logits in (wide[:, :45], wide[:, :45].t().contiguous().t()):
        leaf = logits.requires_grad_()
        loss = cross_entropy(leaf, targets, "triton")
        (grad,) = torch.autograd.grad(loss, leaf, torch.ones(()))
        torch.testing.assert_close(loss.double(), exact[0])
        assert grad.shape == logits.shape and grad.isfinite().all()


def test_logits_of_hundreds_do_not_overflow() -> None:
    logits, targets = torch.randn(12, 40) * 500, some_targets(12, 40)
    fast = forward_and_gradients(op(targets, "triton"), [logits])
    slow = forward_and_gradients(op(targets, "reference"), [logits.double()])
    assert_same(fast, slow, relative_tolerance(torch.float32))


def test_nothing_that_counts_gives_nan_and_a_target_outside_the_vocabulary_too() -> None:
    logits = torch.randn(4, 40)
    assert cross_entropy(logits, torch.full((4,), -100), "triton").isnan()
    assert cross_entropy(logits, torch.tensor([1, 2, 3, 40]), "triton").isnan()
    assert cross_entropy(torch.empty(0, 40), torch.empty(0, dtype=torch.int64), "triton").isnan()


def test_a_loss_that_is_one_per_cent_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(9, 45), some_targets(9, 45)
    slow = forward_and_gradients(op(targets, "reference"), [logits.double()])
    right = kernels.cross_entropy
    monkeypatch.setattr(kernels, "cross_entropy", lambda logits, targets: right(logits, targets) * 1.01)
    with pytest.raises(AssertionError):
        assert_same(forward_and_gradients(op(targets, "triton"), [logits]), slow, relative_tolerance(torch.float32))
