"""Stick-breaking attention: the fast version against the reference, forward and every gradient."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from mfext_kernels.stickbreaking import blocks, cpu, stickbreaking_attention, stickbreaking_decode
from mfext_kernels.stickbreaking.reference import stickbreaking_weights
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance

CHOSEN, HEADS, WIDTH = 2, 3, 5


def queries_keys_values(batch: int, length: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, length, CHOSEN, HEADS, WIDTH, dtype=dtype)
    return q, torch.randn(batch, keys, HEADS, WIDTH, dtype=dtype), torch.randn(batch, keys, HEADS, WIDTH, dtype=dtype)


def compare(inputs: tuple[Tensor, ...], starts: Tensor | None, tolerance: float | None = None) -> None:
    fast = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, starts), inputs)
    exact = [tensor.double() for tensor in inputs]
    slow = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, starts, "reference"), exact)
    assert_same(fast, slow, tolerance or relative_tolerance(inputs[0].dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 257])
def test_fast_and_reference_agree_at_odd_lengths(length: int, batch: int, dtype: torch.dtype) -> None:
    compare(queries_keys_values(batch, length, length, dtype), None)


def test_fast_and_reference_agree_over_many_key_tiles() -> None:
    compare(tuple(tensor[..., :1, :] for tensor in queries_keys_values(1, 1025, 1025, torch.float32)), None)


@pytest.mark.parametrize("shift", [-6.0, 4.0, 40.0, -40.0])
def test_lasting_and_instantly_broken_sticks_agree(shift: float) -> None:
    q, k, v = queries_keys_values(1, 600, 600, torch.float32)
    q[..., 0], k[..., 0] = 1.0, shift * WIDTH**0.5
    # A weight as small as exp(-40) is a difference of sticks near 1: exact to one rounding of 1, not of itself.
    fast = forward_and_gradients(stickbreaking_attention, (q, k, v))
    slow = forward_and_gradients(
        lambda q, k, v: stickbreaking_attention(q, k, v, None, "reference"), [q.double(), k.double(), v.double()]
    )
    for one, other in zip(fast, slow, strict=True):
        allowed = relative_tolerance(torch.float32) * max(1.0, float(other.abs().max()))
        assert float((one.double() - other).abs().max()) <= allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("length", "keys"), [(1, 9), (5, 70), (65, 200), (64, 65)])
def test_queries_after_a_cache_see_the_keys_before_them(length: int, keys: int, dtype: torch.dtype) -> None:
    inputs = queries_keys_values(2, length, keys, dtype)
    compare(inputs, None)
    compare(inputs, torch.randint(0, keys, (2, length)))


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and tiles of few numbers."""
    for module, name, value in (
        (blocks, "QUERIES", 2),
        (blocks, "TILE", 3),
        (cpu, "TILE", 3),
        (blocks, "ELEMENTS", 20),
    ):
        monkeypatch.setattr(module, name, value)


def packed_starts(batch: int, length: int) -> Tensor:
    first = torch.rand(batch, length) < 0.05
    return torch.where(first, torch.arange(length), 0).cummax(1).values


@pytest.mark.parametrize("length", [7, 64, 130, 300])
def test_packed_documents_agree_with_the_reference(length: int) -> None:
    compare(queries_keys_values(3, length, length, torch.float32), packed_starts(3, length))


def test_a_packed_document_is_attended_as_if_it_were_alone() -> None:
    q, k, v = queries_keys_values(1, 150, 150, torch.float64)
    starts = torch.zeros(1, 150, dtype=torch.long)
    starts[:, 71:] = 71
    together = stickbreaking_attention(q, k, v, starts)
    alone = stickbreaking_attention(q[:, 71:], k[:, 71:], v[:, 71:])
    torch.testing.assert_close(together[:, 71:], alone, rtol=1e-12, atol=1e-12)


def test_left_padding_gives_padding_exact_zeros_and_leaves_the_rest_as_without_it() -> None:
    q, k, v = queries_keys_values(2, 100, 100, torch.float32)
    starts = torch.tensor([[0], [83]]).expand(2, 100)
    out = stickbreaking_attention(q, k, v, starts)
    assert torch.count_nonzero(out[1, :83]) == 0
    alone = stickbreaking_attention(q[1:, 83:], k[1:, 83:], v[1:, 83:])
    torch.testing.assert_close(out[1:, 83:], alone, rtol=1e-5, atol=1e-6)
    compare((q, k, v), starts)


def test_a_fully_padded_row_gives_zeros_and_zero_gradients() -> None:
    inputs = queries_keys_values(2, 70, 70, torch.float32)
    starts = torch.tensor([[70], [0]]).expand(2, 70)
    fast = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, starts), inputs)
    assert all(torch.count_nonzero(tensor[0]) == 0 for tensor in fast)
    compare(inputs, starts)


def test_non_contiguous_inputs_agree() -> None:
    q, k, v = queries_keys_values(2, 66, 66, torch.float64)
    q = torch.cat([q, q], dim=-1)[..., ::2]
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    v = v[:, :, :1].expand(-1, -1, HEADS, -1)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    fast = stickbreaking_attention(*leaves)
    slow = stickbreaking_attention(*leaves, None, "reference")
    weighting = torch.randn(fast.shape, dtype=fast.dtype)
    grads = [torch.autograd.grad((out * weighting).sum(), leaves, retain_graph=True) for out in (fast, slow)]
    assert_same([fast.detach(), *grads[0]], [slow.detach(), *grads[1]], relative_tolerance(torch.float64))


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    q, k, v = (tensor.bfloat16() for tensor in queries_keys_values(2, 130, 130, torch.float32))
    compare((q, k, v), None, tolerance=2 * torch.finfo(torch.bfloat16).eps)
    exact = stickbreaking_attention(q.float(), k.float(), v.float())
    assert torch.equal(stickbreaking_attention(q, k, v), exact.bfloat16())


def test_autocast_does_not_reach_inside() -> None:
    q, k, v = queries_keys_values(1, 65, 65, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = forward_and_gradients(stickbreaking_attention, (q, k, v))
    assert_same(inside, forward_and_gradients(stickbreaking_attention, (q, k, v)), 0.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("starts", [None, torch.tensor([[0, 0, 2, 2, 2], [0, 4, 4, 4, 4]])])
def test_gradcheck_in_float64(backend: str, starts: Tensor | None) -> None:
    inputs = [tensor[..., :2].contiguous().requires_grad_() for tensor in queries_keys_values(2, 5, 6, torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: stickbreaking_attention(q, k, v, starts, backend), inputs)


def test_gradcheck_over_several_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    inputs = [
        tensor[..., :2, :1].contiguous().requires_grad_() for tensor in queries_keys_values(2, 5, 8, torch.float64)
    ]
    for starts in (None, torch.tensor([[0] * 3 + [6] * 2, [3] * 5])):
        assert torch.autograd.gradcheck(lambda q, k, v, s=starts: stickbreaking_attention(q, k, v, s), inputs)


def test_weights_of_the_reference_follow_the_equation() -> None:
    q, k, _ = queries_keys_values(1, 6, 6, torch.float64)
    weights = stickbreaking_weights(q, k)
    logits = torch.einsum("btkhc,bshc->bkhts", q, k) / WIDTH**0.5
    for query in range(6):
        for key in range(6):
            expected = torch.zeros_like(logits[..., 0, 0])
            if key <= query:
                expected = torch.sigmoid(logits[..., query, key])
                for between in range(key + 1, query + 1):
                    expected = expected * (1 - torch.sigmoid(logits[..., query, between]))
            torch.testing.assert_close(weights[..., query, key], expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_decoding_one_position_is_the_last_row_of_attention(backend: str) -> None:
    q, k, v = queries_keys_values(2, 90, 90, torch.float64)
    for starts in (None, torch.tensor([0, 77]), torch.tensor([90, 3])):
        starts_BT = None if starts is None else starts[:, None].expand(2, 90)
        whole = stickbreaking_attention(q, k, v, starts_BT)
        one = stickbreaking_decode(q[:, -1], k, v, starts, backend)
        torch.testing.assert_close(one, whole[:, -1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("logit", [0.0, -3.0, -9.0])
def test_decoding_reads_the_far_keys_where_the_near_ones_left_stick(logit: float) -> None:
    """At -9 the nearest tile takes 3 % of the stick; at 0, in fp32, all of it."""
    q, k, v = queries_keys_values(2, 1, 3 * cpu.TILE, torch.float32)
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1.0, logit * WIDTH**0.5
    one = stickbreaking_decode(q[:, 0], k, v)
    exact = stickbreaking_decode(q[:, 0].double(), k.double(), v.double(), None, "reference")
    torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5)


def test_decoding_with_gradients_agrees_with_the_reference() -> None:
    q, k, v = queries_keys_values(2, 1, 20, torch.float64)
    fast = forward_and_gradients(stickbreaking_decode, (q[:, 0], k, v))
    slow = forward_and_gradients(lambda q, k, v: stickbreaking_decode(q, k, v, None, "reference"), (q[:, 0], k, v))
    assert_same(fast, slow, relative_tolerance(torch.float64))


def test_no_tensor_of_queries_times_keys_is_allocated() -> None:
    length = 1024
    q, k, v = (tensor.requires_grad_() for tensor in queries_keys_values(1, length, length, torch.float32))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = stickbreaking_attention(q, k, v)
        out.backward(torch.ones_like(out))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < length * length * CHOSEN * HEADS * 4 / 4, f"{largest} bytes in one allocation"
    assert largest > 0


def test_a_kernel_one_percent_wrong_fails_the_comparison() -> None:
    inputs = queries_keys_values(1, 65, 65, torch.float32)
    right = forward_and_gradients(stickbreaking_attention, inputs)
    for wrong_part in range(4):
        wrong = [tensor * 1.01 if part == wrong_part else tensor for part, tensor in enumerate(right)]
        with pytest.raises(AssertionError, match="off by"):
            assert_same(wrong, right, relative_tolerance(torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, HEADS, WIDTH)}, "3 keys for 4 queries"),
        ({"k": torch.zeros(2, 4, HEADS, WIDTH + 1)}, "k, v: must both be"),
        ({"starts": torch.zeros(2, 3, dtype=torch.long)}, r"starts_BT: must be \(2, 4\)"),
        ({"q": torch.zeros(2, 4, HEADS, WIDTH)}, "5 dimensions"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    q, k, v = queries_keys_values(2, 4, 4, torch.float32)
    given = {"q": q, "k": k, "v": v, "starts": None, "backend": None} | change
    if "k" in change and given["k"].shape[1] == 3:
        given["v"] = given["k"]
    with pytest.raises(ValueError, match=message):
        stickbreaking_attention(given["q"], given["k"], given["v"], given["starts"], given["backend"])


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 7, 30])])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_decoding_in_a_caches_whole_room_is_decoding_over_what_is_filled(
    backend: Literal["cpu", "reference"], starts: Tensor | None
) -> None:
    q, k, v = torch.randn(3, 2, 2, 4), *torch.randn(2, 3, 50, 2, 4)
    ends = torch.tensor([1, 31, 50])
    fast = stickbreaking_decode(q, k, v, starts, backend, ends)
    for row, end in enumerate(ends.tolist()):
        start = None if starts is None else starts[row : row + 1]
        alone = stickbreaking_decode(q[row : row + 1], k[row : row + 1, :end], v[row : row + 1, :end], start, backend)
        torch.testing.assert_close(fast[row : row + 1], alone)


def test_ends_of_another_shape_or_with_a_gradient_are_refused() -> None:
    q, k, v = torch.randn(3, 2, 2, 4), *torch.randn(2, 3, 50, 2, 4)
    with pytest.raises(ValueError, match=r"ends_B: must be \(3,\), not \(2,\)"):
        stickbreaking_decode(q, k, v, ends_B=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="no gradient"):
        stickbreaking_decode(q.requires_grad_(), k, v, ends_B=torch.tensor([1, 2, 3]))
