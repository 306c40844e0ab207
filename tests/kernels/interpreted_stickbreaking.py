"""Stick-breaking attention's Triton kernels in Triton's interpreter, against the float64 reference.

Run by test_triton_interpreter.py in a process of its own; by hand: TRITON_INTERPRET=1 pytest <this file>.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mfext_kernels.stickbreaking import stickbreaking_attention, stickbreaking_decode
from mfext_kernels.stickbreaking import triton as kernels
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every new buffer holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for (B, T, S, K, H, C)."""
    batch, length, keys, chosen, heads, width = shape
    q = torch.randn(batch, length, chosen, heads, width).to(dtype)
    k, v = (torch.randn(batch, keys, heads, width).to(dtype) for _ in range(2))
    return q, k, v


def compare(inputs: tuple[Tensor, ...], starts: Tensor | None = None, tolerance: float | None = None) -> None:
    fast = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, starts, "triton"), inputs)
    assert all(tensor.dtype == inputs[0].dtype for tensor in fast)
    exact = [tensor.double() for tensor in inputs]
    slow = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, starts, "reference"), exact)
    assert_same(fast, slow, tolerance or relative_tolerance(inputs[0].dtype))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 5), (1, 1, 35, 2, 1, 3), (1, 16, 16, 1, 1, 16), (2, 17, 17, 2, 2, 5), (1, 9, 40, 3, 2, 20)],
)
def test_kernels_and_reference_agree_at_odd_sizes(shape: tuple[int, ...]) -> None:
    compare(random_inputs(shape))


def test_fp16_inputs_stay_within_four_roundings() -> None:
    compare(random_inputs((1, 37, 37, 2, 1, 8), torch.float16), tolerance=4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("starts", ["documents", "scattered", "padded"])
def test_documents_and_padding_agree(starts: str) -> None:
    inputs = random_inputs((2, 35, 40, 2, 1, 4))
    first = {
        "documents": torch.tensor([[0] * 10 + [12] * 25, [0] * 3 + [8] * 20 + [28] * 12]),
        "scattered": torch.randint(-3, 45, (2, 35)),
        "padded": torch.tensor([[40], [20]]).expand(2, 35),
    }[starts]
    compare(inputs, first)


@pytest.mark.parametrize("shift", [-6.0, -40.0, 6.0, 70.0, 300.0])
def test_lasting_and_instantly_broken_sticks_agree(shift: float) -> None:
    q, k, v = random_inputs((1, 90, 90, 1, 1, 5))
    q[..., 0], k[..., 0] = 1.0, shift * 5**0.5
    fast = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, None, "triton"), (q, k, v))
    slow = forward_and_gradients(
        lambda q, k, v: stickbreaking_attention(q, k, v, None, "reference"), [q.double(), k.double(), v.double()]
    )
    for one, other in zip(fast, slow, strict=True):
        # Weights near 0 leave a gradient that is what rounding leaves of numbers of order one.
        allowed = relative_tolerance(torch.float32) * max(1.0, float(other.abs().max()))
        assert float((one.double() - other).abs().max()) <= allowed


def test_keys_that_no_stick_reaches_are_passed_over() -> None:
    q, k, v = random_inputs((1, 1, 200, 1, 1, 4))
    q[..., 0], k[..., 0] = 1.0, 2 * 30.0
    v[:, :100] = float("nan")  # would reach the output through 0 * NaN
    out = stickbreaking_attention(q, k, v, None, "triton")
    assert out.isfinite().all()


def test_several_stripes_give_the_gradients_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs((2, 40, 45, 2, 1, 4))
    starts = torch.randint(0, 30, (2, 40))
    whole = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, starts, "triton"), inputs)
    monkeypatch.setattr(kernels, "CARRIED_BYTES", 1)
    striped = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, starts, "triton"), inputs)
    assert_same(striped, whole, 1e-6)
    compare(inputs, starts)


def test_two_runs_give_the_same_bits() -> None:
    inputs = random_inputs((1, 33, 33, 2, 2, 4))
    runs = [
        forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, None, "triton"), inputs)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_non_contiguous_inputs_and_stride_0_gradients_agree() -> None:
    q, k, v = random_inputs((2, 18, 18, 2, 3, 6))
    q = torch.cat([q, q], dim=-1)[..., ::2]
    k = k.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    v = v[:, :, :1].expand(-1, -1, 3, -1)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    results = []
    for backend in ("triton", "reference"):
        out = stickbreaking_attention(*leaves, None, backend)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert_same(*results, relative_tolerance(torch.float32))


def test_a_nan_stays_one() -> None:
    q, k, v = random_inputs((1, 20, 20, 1, 1, 4))
    q[0, 7] = float("nan")
    out = stickbreaking_attention(q, k, v, None, "triton")
    assert out[0, 7].isnan().all() and out[0, :7].isfinite().all() and out[0, 8:].isfinite().all()


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 77]), torch.tensor([150, 3])])
@pytest.mark.parametrize("logit", [0.0, -5.0])
def test_decoding_is_the_reference_over_many_splits(logit: float, starts: Tensor | None) -> None:
    q, k, v = random_inputs((2, 1, 150, 3, 2, 5))
    q[..., 0], k[..., 0] = 1.0, logit * 5**0.5
    cache = torch.full((2, 2, 200, 5), float("nan"))  # the model's cache: heads first, more room than keys
    cache[:, :, :150] = k.transpose(1, 2)
    one = stickbreaking_decode(q[:, 0], cache.transpose(1, 2)[:, :150], v, starts, "triton")
    exact = stickbreaking_decode(q[:, 0].double(), k.double(), v.double(), starts, "reference")
    assert_same([one], [exact], relative_tolerance(torch.float32))


def test_decoding_with_gradients_and_folded_agrees_with_the_reference() -> None:
    q, k, v = random_inputs((2, 1, 20, 2, 1, 5))
    fast = forward_and_gradients(lambda q, k, v: stickbreaking_decode(q, k, v, None, "triton"), (q[:, 0], k, v))
    slow = forward_and_gradients(
        lambda q, k, v: stickbreaking_decode(q, k, v, None, "reference"), [t.double() for t in (q[:, 0], k, v)]
    )
    assert_same(fast, slow, relative_tolerance(torch.float32))
    folded = kernels.decode_folded(q[:, 0, :, 0], k[:, :, 0], v[:, :, 0])
    assert_same([folded.unsqueeze(2)], slow[:1], relative_tolerance(torch.float32))


def test_a_kernel_one_per_cent_wrong_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels._Call, "scale", property(lambda call: 1.01 * call.q.shape[-1] ** -0.5))
    with pytest.raises(AssertionError, match="output: off by"):
        compare(random_inputs((1, 17, 17, 2, 1, 5)))


@pytest.mark.parametrize("name", ["grad_queries_kernel", "grad_keys_kernel"])
def test_a_gradient_kernel_one_per_cent_wrong_fails_the_comparison(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)
    scale = right.arg_names.index("scale")

    class Wrong:
        def __getitem__(self, grid):
            return lambda *given, **constants: right[grid](
                *given[:scale], given[scale] * 1.01, *given[scale + 1 :], **constants
            )

    monkeypatch.setattr(kernels, name, Wrong())
    with pytest.raises(AssertionError, match=r"gradient of input [012]: off by"):
        compare(random_inputs((1, 17, 17, 2, 1, 5)))


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 7, 30])])
def test_decoding_in_a_caches_whole_room_is_decoding_over_what_is_filled(starts: Tensor | None) -> None:
    q, k, v = torch.randn(3, 2, 1, 4), *torch.randn(2, 3, 150, 1, 4)
    ends = torch.tensor([1, 131, 150])
    one = stickbreaking_decode(q, k, v, starts, "triton", ends)
    exact = stickbreaking_decode(q.double(), k.double(), v.double(), starts, "reference", ends)
    assert_same([one], [exact], relative_tolerance(torch.float32))
