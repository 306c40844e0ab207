"""Products by oneDNN: as exact as torch's, chosen by rule, the same bits for a row however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfext_kernels import products
from mfext_kernels.products import choice, linear, product, product_over_rows
from tests.kernels.counting import counted

# rows, inner width, columns: few and many rows, whole blocks and not, odd widths, and nothing at all
SIZES = [
    *((rows, 256, 256) for rows in (0, 1, 3, 63, 64, 65, 100, 128, 500)),
    (200, 129, 257), (64, 640, 129), (1000, 33, 70), (70, 1, 40000), (70, 40000, 1),
    (0, 0, 5), (7, 0, 5), (300, 256, 0),
]  # fmt: skip
LARGE = (500, 256, 256)
WITHIN = 2e-6  # of the largest element, as torch's own


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor where MKL is slow, whatever this one is."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has not both libraries")
    monkeypatch.delenv("MFEXT_ONEDNN", raising=False)
    monkeypatch.setattr(products, "_processor", lambda: ("AuthenticAMD", 26))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    choice.cache_clear()
    yield
    choice.cache_clear()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    if exact.numel():
        assert (found - exact).abs().max() <= WITHIN * exact.abs().max().clamp(min=1e-30)


def by_rows(matrix: Tensor) -> list[Tensor]:
    """The same matrix in other layouts: transposed, a slice of a wider one, every second row, one row shown often."""
    wide = torch.zeros(matrix.shape[0], 2 * matrix.shape[1] + 1)
    wide[:, : matrix.shape[1]] = matrix
    tall = torch.zeros(2 * matrix.shape[0], matrix.shape[1])
    tall[::2] = matrix
    return [matrix.t().contiguous().t(), wide[:, : matrix.shape[1]], tall[::2]]


@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_as_exact_as_torchs(sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    left, right, grad = drawn(rows, inner), drawn(inner, columns, seed=1), drawn(rows, columns, seed=2)
    assert_near(product(left, right), left.double() @ right.double())
    assert_near(product(left, right.t().contiguous().t()), left.double() @ right.double())
    assert_near(product_over_rows(left, grad), left.double().t() @ grad.double())


def test_large_products_go_to_onednn_and_small_ones_do_not() -> None:
    rows, inner, columns = LARGE
    left, right = drawn(rows, inner), drawn(inner, columns)
    assert counted(lambda: product(left, right)).onednn_calls == 2, "whole steps, and the rows after them"
    assert counted(lambda: product(left[:448], right)).onednn_calls == 1
    assert counted(lambda: product_over_rows(left, left)).onednn_calls == 1
    assert counted(lambda: product(left[:63], right)).onednn_calls == 0
    assert counted(lambda: product(left, right[:, :8])).onednn_calls == 0


@pytest.mark.parametrize("layout", range(3))
def test_the_layout_of_the_operands_does_not_matter(layout: int) -> None:
    rows, inner, columns = LARGE
    left, right, grad = drawn(rows, inner), drawn(inner, columns, seed=1), drawn(rows, columns, seed=2)
    assert_near(product(by_rows(left)[layout], by_rows(right)[layout]), left.double() @ right.double())
    assert_near(product_over_rows(by_rows(left)[layout], by_rows(grad)[layout]), left.double().t() @ grad.double())


def test_one_row_shown_often_is_multiplied_like_its_copies() -> None:
    row, right = drawn(1, 256), drawn(256, 256, seed=1)
    assert torch.equal(product(row.expand(500, 256), right), product(row.repeat(500, 1), right))
    assert torch.equal(product_over_rows(row.expand(500, 256), row.expand(500, 256)), product_over_rows(
        row.repeat(500, 1), row.repeat(500, 1)))  # fmt: skip


@pytest.mark.parametrize(("inner", "columns"), [(256, 256), (129, 257), (300, 2000)])
def test_a_rows_bits_do_not_depend_on_how_many_rows_there_are_or_on_the_call(inner: int, columns: int) -> None:
    left, right = drawn(777, inner), drawn(inner, columns, seed=1)
    everything = product(left, right)
    assert torch.equal(everything, product(left, right))
    for rows in (64, 65, 79, 80, 81, 127, 128, 129, 500, 776):
        assert torch.equal(product(left[:rows], right), everything[:rows])
        assert torch.equal(product(left[777 - rows :], right), everything[777 - rows :])
    grad = drawn(777, columns, seed=2)
    assert torch.equal(product_over_rows(left, grad), product_over_rows(left, grad))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_gradients_are_as_exact_as_torchs(sizes: tuple[int, int, int], bias: bool) -> None:
    rows, inner, columns = sizes
    parts = [drawn(rows, inner), drawn(columns, inner, seed=1), *([drawn(columns, seed=2)] if bias else [])]
    leaves, exact_leaves = (
        [each.to(dtype).requires_grad_() for each in parts] for dtype in (torch.float32, torch.float64)
    )
    y, exact = linear(*leaves), F.linear(*exact_leaves)
    assert_near(y, exact)
    grad = drawn(rows, columns, seed=3)
    found = torch.autograd.grad(y, leaves, grad)
    for each, expected in zip(found, torch.autograd.grad(exact, exact_leaves, grad.double()), strict=True):
        assert_near(each, expected)


def test_linear_takes_leading_dimensions_and_expanded_gradients() -> None:
    x, weight = drawn(4, 125, 256).requires_grad_(), drawn(256, 256, seed=1).requires_grad_()
    y = linear(x, weight)
    assert y.shape == (4, 125, 256)
    y.sum().backward()
    assert_near(x.grad, weight.detach().double().sum(0).expand(4, 125, 256))
    assert_near(weight.grad, x.detach().double().sum((0, 1)).expand(256, 256))


def test_linear_computes_only_the_gradients_asked_for() -> None:
    """Each is one product as large as forward's."""
    x, weight, bias = drawn(512, 256), drawn(256, 256, seed=1), drawn(256, seed=2)
    one = 2 * 512 * 256 * 256
    for asked, expected in (((x,), one), ((weight,), one), ((bias,), 0), ((x, weight, bias), 2 * one)):
        for each in (x, weight, bias):
            each.requires_grad_(any(each is other for other in asked))
        y = linear(x, weight, bias)
        work = counted(lambda y=y, asked=asked: torch.autograd.grad(y, asked, torch.ones_like(y)))
        assert work.flops == expected


def test_linear_cannot_be_differentiated_twice_where_it_is_not_torchs() -> None:
    x, weight = drawn(500, 256).requires_grad_(), drawn(256, 256, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_autograd_autocast_or_another_precision_must_see_is_left_to_torch() -> None:
    left, right = drawn(500, 256), drawn(256, 256, seed=1)
    for dtype in (torch.float64, torch.bfloat16):
        work = counted(lambda dtype=dtype: linear(left.to(dtype), right.to(dtype)))
        assert work.onednn_calls == 0 and product(left.to(dtype), right.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(left, right).dtype == product(left, right).dtype == torch.bfloat16
    watched = right.clone().requires_grad_()
    (grad,) = torch.autograd.grad(product(left, watched).sum(), watched)
    assert_near(grad, left.double().sum(0).unsqueeze(1).expand(256, 256))
    with torch.no_grad():
        assert counted(lambda: product(left, watched)).onednn_calls == 2


def test_a_product_is_counted_as_its_floating_point_operations() -> None:
    assert counted(lambda: linear(drawn(512, 256), drawn(256, 256))).flops == 2 * 512 * 256 * 256


@pytest.mark.parametrize(
    ("processor", "capability", "says"),
    [
        (("GenuineIntel", 6), "AVX512", "MKL (GenuineIntel, AVX512)"),
        (("AuthenticAMD", 26), "AVX2", "MKL (AuthenticAMD, AVX2)"),
        (("AuthenticAMD", 25), "AVX512", "MKL (AuthenticAMD, family 25, multiplies no faster with AVX-512)"),
        ((None, 0), "AVX512", "MKL (unknown processor, AVX512)"),
    ],
)
def test_where_mkl_is_fast_or_nothing_is_known_torch_multiplies(
    processor: tuple[str | None, int], capability: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.explain() == says
    left, right = drawn(500, 256), drawn(256, 256, seed=1)
    assert torch.equal(product(left, right), left @ right)
    assert torch.equal(linear(left, right), F.linear(left, right))
    assert torch.equal(product_over_rows(left, left), left.t() @ left)


def test_it_is_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products.explain() == "oneDNN (MKL is slow on AuthenticAMD)"
    monkeypatch.setenv("MFEXT_ONEDNN", "0")
    assert choice().onednn, "decided once a process"
    choice.cache_clear()
    assert not choice().onednn and "MFEXT_ONEDNN=0" in products.explain()


@pytest.mark.parametrize("library", ["mkl", "mkldnn"])
def test_without_one_of_the_libraries_torch_multiplies(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda: False)
    assert not choice().onednn


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_of_an_odd_vocabulary_is_the_same_with_outputs_added_and_cut_off(bias: bool) -> None:
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(77, 8, dtype=torch.float64)
    inputs = [x, weight, *([torch.randn(77, dtype=torch.float64)] if bias else [])]
    given = [each.clone().requires_grad_() for each in inputs]
    plain = [each.clone().requires_grad_() for each in inputs]
    ours, theirs = products.aligned_linear(*given, *([] if bias else [None])), F.linear(*plain)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, given, grad), torch.autograd.grad(theirs, plain, grad), strict=True
    ):
        torch.testing.assert_close(one, other)
