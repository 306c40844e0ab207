"""Stick-breaking attention of heads too wide for registers, in Triton's interpreter, against the float64 reference.

Run by test_triton_interpreter.py in a process of its own; by hand: TRITON_INTERPRET=1 pytest <this file>.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mfext_kernels.stickbreaking import (
    WIDEST_HEAD_BYTES,
    stickbreaking_attention,
    stickbreaking_decode,
    stickbreaking_decode_folded,
    wide_heads,
)
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance
from tests.kernels.interpreted_stickbreaking import compare, random_inputs

WIDTH = WIDEST_HEAD_BYTES // 4 + 1


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every new buffer holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The stripes that forward met: pairs, queries and keys of each."""
    stripes: list[tuple[int, ...]] = []
    right = wide_heads._attend

    def seen(call: wide_heads._Call, stripe: wide_heads._Stripe, *rest: object) -> None:
        stripes.append((stripe.pair_end - stripe.pair, stripe.last - stripe.first, stripe.num_keys))
        right(call, stripe, *rest)

    monkeypatch.setattr(wide_heads, "_attend", seen)
    return stripes


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, WIDTH),
        (1, 1, 35, 2, 1, WIDTH),
        (1, 16, 16, 1, 1, 132),
        (2, 17, 17, 2, 2, 140),
        (1, 9, 40, 3, 2, WIDTH),
        (0, 4, 5, 2, 2, WIDTH),
        (2, 0, 5, 2, 1, WIDTH),
    ],
)
def test_kernels_and_reference_agree_at_odd_sizes(shape: tuple[int, ...], attended: list[tuple[int, ...]]) -> None:
    compare(random_inputs(shape))
    batch, length, keys, _, heads, _ = shape
    assert attended == ([(batch * heads, length, keys)] if batch * length else [])


def test_fp16_inputs_stay_within_four_roundings(attended: list[tuple[int, ...]]) -> None:
    inputs = random_inputs((1, 37, 37, 2, 1, 260), torch.float16)
    compare(inputs, tolerance=4 * torch.finfo(torch.float16).eps)
    assert attended


@pytest.mark.parametrize("starts", ["documents", "scattered", "padded"])
def test_documents_and_padding_agree(starts: str) -> None:
    first = {
        "documents": torch.tensor([[0] * 10 + [12] * 25, [0] * 3 + [8] * 20 + [28] * 12]),
        "scattered": torch.randint(-3, 45, (2, 35)),
        "padded": torch.tensor([[40], [20]]).expand(2, 35),
    }[starts]
    compare(random_inputs((2, 35, 40, 2, 2, WIDTH)), first)


@pytest.mark.parametrize("shift", [-6.0, -40.0, 6.0, 70.0, 300.0])
def test_lasting_and_instantly_broken_sticks_agree(shift: float) -> None:
    q, k, v = random_inputs((1, 90, 90, 1, 1, WIDTH))
    q[..., 0], k[..., 0] = 1.0, shift * WIDTH**0.5
    fast = forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, None, "triton"), (q, k, v))
    slow = forward_and_gradients(
        lambda q, k, v: stickbreaking_attention(q, k, v, None, "reference"), [q.double(), k.double(), v.double()]
    )
    for one, other in zip(fast, slow, strict=True):
        # Weights near 0 leave a gradient that is what rounding leaves of numbers of order one.
        allowed = relative_tolerance(torch.float32) * max(1.0, float(other.abs().max()))
        assert float((one.double() - other).abs().max()) <= allowed


@pytest.mark.parametrize(
    ("elements", "queries", "stripes"),
    [
        (1 << 26, 16, [(4, 16, 21), (4, 16, 37), (4, 8, 45)]),
        (45 * 2 * 50, 20, [(4, 20, 25), (2, 20, 45), (2, 20, 45)]),
        (45 * 2 * 20, 512, [(1, 20, 25)] * 4 + [(1, 20, 45)] * 4),
        (1, 512, [(1, 1, 6 + query) for query in range(40) for _ in range(4)]),
    ],
)
def test_stripes_are_bounded_and_give_what_one_gives(
    elements: int,
    queries: int,
    stripes: list[tuple[int, ...]],
    attended: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = random_inputs((2, 40, 45, 2, 2, WIDTH))
    starts = torch.randint(0, 30, (2, 40))
    monkeypatch.setattr(wide_heads, "ELEMENTS", elements)
    monkeypatch.setattr(wide_heads, "QUERIES", queries)
    compare(inputs, starts)
    assert attended == stripes


def test_two_runs_give_the_same_bits() -> None:
    inputs = random_inputs((1, 33, 33, 2, 2, WIDTH))
    runs = [
        forward_and_gradients(lambda q, k, v: stickbreaking_attention(q, k, v, None, "triton"), inputs)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_non_contiguous_inputs_and_stride_0_gradients_agree() -> None:
    q, k, v = random_inputs((2, 18, 18, 2, 3, WIDTH))
    q, v = (torch.cat([each, each], dim=-1)[..., ::2] for each in (q, v))
    k = k[:, :, :1].expand(-1, -1, 3, -1)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    results = []
    for backend in ("triton", "reference"):
        out = stickbreaking_attention(*leaves, None, backend)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert_same(*results, relative_tolerance(torch.float32))


def test_autocast_rounds_no_product() -> None:
    inputs = random_inputs((1, 20, 20, 2, 1, WIDTH))
    with torch.autocast("cpu", torch.bfloat16):
        compare(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_on_a_card_leaves_in_fp32(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        a, b = (torch.empty(2, 3, 3, dtype=dtype, device="cuda") for _ in range(2))
        product = wide_heads._product(a, b.transpose(1, 2))
    assert product.dtype == torch.float32 and product.is_contiguous()


def test_a_nan_stays_one() -> None:
    q, k, v = random_inputs((1, 20, 20, 1, 1, WIDTH))
    q[0, 7] = float("nan")
    out = stickbreaking_attention(q, k, v, None, "triton")
    assert out[0, 7].isnan().all() and out[0, :7].isfinite().all() and out[0, 8:].isfinite().all()


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 77]), torch.tensor([150, 3])])
@pytest.mark.parametrize("logit", [0.0, -5.0])
def test_decoding_is_the_reference_over_many_tiles(logit: float, starts: Tensor | None) -> None:
    q, k, v = random_inputs((2, 1, 150, 3, 2, WIDTH))
    q[..., 0], k[..., 0] = 1.0, logit * WIDTH**0.5
    cache = torch.full((2, 2, 200, WIDTH), float("nan"))  # the model's cache: heads first, more room than keys
    cache[:, :, :150] = k.transpose(1, 2)
    one = stickbreaking_decode(q[:, 0], cache.transpose(1, 2)[:, :150], v, starts, "triton")
    exact = stickbreaking_decode(q[:, 0].double(), k.double(), v.double(), starts, "reference")
    assert_same([one], [exact], relative_tolerance(torch.float32))


def test_decoding_with_gradients_and_folded_agrees_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_inputs((2, 1, 20, 2, 1, WIDTH))
    fast = forward_and_gradients(lambda q, k, v: stickbreaking_decode(q, k, v, None, "triton"), (q[:, 0], k, v))
    slow = forward_and_gradients(
        lambda q, k, v: stickbreaking_decode(q, k, v, None, "reference"), [t.double() for t in (q[:, 0], k, v)]
    )
    assert_same(fast, slow, relative_tolerance(torch.float32))
    monkeypatch.setattr("mfext_kernels.stickbreaking.choose", lambda backend, tensor: "triton")
    folded = stickbreaking_decode_folded(q[:, 0, :, 0], k[:, :, 0], v[:, :, 0])
    assert_same([folded.unsqueeze(2)], slow[:1], relative_tolerance(torch.float32))


def test_a_scale_one_per_cent_wrong_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_heads._Call, "scale", property(lambda call: 1.01 * call.q_XRC.shape[-1] ** -0.5))
    with pytest.raises(AssertionError, match="output: off by"):
        compare(random_inputs((1, 17, 17, 2, 1, WIDTH)))


@pytest.mark.parametrize(("part", "found"), [(0, "gradient of input 2"), (1, "gradient of input 0")])
def test_a_gradient_one_per_cent_wrong_fails_the_comparison(
    part: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = wide_heads._differentiate

    def wrong(*given: object) -> list[Tensor]:
        return [tensor * (1.01 if number == part else 1.0) for number, tensor in enumerate(right(*given))]

    monkeypatch.setattr(wide_heads, "_differentiate", wrong)
    with pytest.raises(AssertionError, match=f"{found}: off by"):
        compare(random_inputs((1, 17, 17, 2, 1, WIDTH)))


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 7, 30])])
def test_decoding_in_a_caches_whole_room_is_decoding_over_what_is_filled(starts: Tensor | None) -> None:
    q, k, v = torch.randn(3, 2, 1, 160), *torch.randn(2, 3, 150, 1, 160)
    ends = torch.tensor([1, 131, 150])
    one = stickbreaking_decode(q, k, v, starts, "triton", ends)
    exact = stickbreaking_decode(q.double(), k.double(), v.double(), starts, "reference", ends)
    assert_same([one], [exact], relative_tolerance(torch.float32))
