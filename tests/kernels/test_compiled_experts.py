"""Compiled expert maps beside torch's, which take their place where there is no compiler."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mfext_kernels.grouped_linear import compiled, expert_feedforward, gather_linear, order_rows, scatter_linear
from mfext_kernels.routing import Dispatch, make_dispatch
from tests.kernels.comparison import assert_same, forward_and_gradients, relative_tolerance

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")

# tokens, experts, tall, inner, wide: less than a vector, no multiple of one, several strips, more rows than at once
SIZES = [(1, 1, 1, 1, 1), (9, 4, 3, 5, 2), (70, 6, 16, 33, 40), (1300, 2, 20, 64, 17), (700, 3, 65, 31, 100)]
Given = tuple[Dispatch, list[Tensor]]


def given(tokens: int, experts: int, tall: int, inner: int, wide: int, chosen: int = 2) -> Given:
    chosen = min(chosen, experts)
    dispatch = make_dispatch(torch.rand(tokens, experts).topk(chosen, -1).indices, experts)
    up, down = torch.randn(experts, tall, inner), torch.randn(experts, inner, wide)
    return dispatch, [torch.randn(tokens, tall), up, down, torch.rand(tokens, chosen)]


def feed_forward(dispatch: Dispatch) -> Callable[..., Tensor]:
    return lambda x, up, down, gates: expert_feedforward(x, [up], [down], gates, dispatch)


def attention_like(dispatch: Dispatch) -> Callable[..., Tensor]:
    return lambda x, up, down, gates: scatter_linear(gather_linear(x, [up], dispatch), [down], gates, dispatch)


def compare(case: Given) -> None:
    dispatch, inputs = case
    for op in (feed_forward, attention_like):
        exact = forward_and_gradients(op(dispatch), [each.double() for each in inputs])
        assert_same(forward_and_gradients(op(dispatch), inputs), exact, relative_tolerance(torch.float32))


@pytest.fixture
def built_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Builds it anew with more flags."""

    def build_anew(*flags: str) -> None:
        source = replace(compiled.SOURCE, flags=(*compiled.SOURCE.flags, *flags))
        monkeypatch.setattr(compiled, "SOURCE", source)
        assert source.available(), source.explain()

    return build_anew


@pytest.mark.parametrize("sizes", SIZES)
def test_any_size_agrees_with_double_precision(sizes: tuple[int, int, int, int, int]) -> None:
    assert compiled.available(), compiled.explain()
    compare(given(*sizes))


@pytest.mark.parametrize("sizes", SIZES[2:4])
def test_torch_agrees_in_single_precision_too(
    sizes: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "applies", lambda *tensors: False)
    compare(given(*sizes))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86 processors")
@pytest.mark.parametrize("without", [["-mno-avx512f"], ["-mno-avx512f", "-mno-avx"], ["-ffp-contract=off"]])
def test_narrower_vectors_agree(without: list[str], built_with: Callable[..., None]) -> None:
    built_with(*without)
    compare(given(*SIZES[2]))


def test_experts_without_rows_and_all_rows_to_one_agree() -> None:
    _, inputs = given(200, 5, 20, 30, 40)
    for experts_NK in (torch.full((200, 2), 3), torch.tensor([[0, 4]]).expand(200, 2).contiguous()):
        compare((make_dispatch(experts_NK, 5), inputs))


def test_what_lies_in_fresh_memory_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = given(*SIZES[4])
    monkeypatch.setattr(compiled, "_room", lambda numbers: torch.full((numbers,), torch.nan))
    for name in ("empty_like", "empty"):
        clean = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *of, _clean=clean, **named: _clean(*of, **named).fill_(torch.nan))
    clean_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *of, **named: clean_new(self, *of, **named).fill_(torch.nan))
    compare(case)


@pytest.mark.parametrize("op", [feed_forward, attention_like])
def test_threads_share_the_work_without_changing_a_bit(
    op: Callable[[Dispatch], Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch, inputs = given(500, 3, 33, 40, 50)
    alone = forward_and_gradients(op(dispatch), inputs)
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(compiled, "COPIED_BY_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, other in zip(alone, forward_and_gradients(op(dispatch), inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 63])
@torch.no_grad()
def test_a_rows_bits_are_those_of_the_row_alone(tokens: int) -> None:
    experts_NK = torch.rand(64, 4).topk(2, -1).indices
    _, (x, up, down, gates) = given(64, 4, 40, 50, 60)
    everything = expert_feedforward(x, [up], [down], gates, make_dispatch(experts_NK, 4))
    some = make_dispatch(experts_NK[:tokens], 4)
    assert torch.equal(expert_feedforward(x[:tokens], [up], [down], gates[:tokens], some), everything[:tokens])


def test_not_a_number_in_a_token_reaches_its_own_output_alone() -> None:
    dispatch, (x, up, down, gates) = given(100, 4, 20, 30, 40)
    x[50] = torch.nan
    out = expert_feedforward(x, [up], [down], gates, dispatch)
    assert out[50].isnan().all() and out[:50].isfinite().all() and out[51:].isfinite().all()
    rows = order_rows(gather_linear(x, [up], dispatch), dispatch)
    assert rows[50].isnan().all() and rows[:50].isfinite().all()


def test_gelu_holds_at_both_ends() -> None:
    """One expert that passes a number on, gelu, and one that gives it back."""
    x = torch.tensor([[-1e4], [-87.0], [-30.0], [-1.0], [0.0], [1.0], [30.0], [1e4]])
    one, dispatch = torch.ones(1, 1, 1), make_dispatch(torch.zeros(8, 1, dtype=torch.long), 1)
    found, *grads = forward_and_gradients(
        lambda x: expert_feedforward(x, [one], [one], torch.ones(8, 1), dispatch), [x]
    )
    exact, *exact_grads = forward_and_gradients(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), [x.double()])
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(grads[0].double(), exact_grads[0], rtol=1e-5, atol=1e-7)
