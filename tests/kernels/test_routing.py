"""The dispatch: sorted by expert, stable, and its own inverse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfext_kernels.routing import compiled, make_dispatch, top_k


@pytest.fixture(params=["compiled", "torch"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways: a compiler's where there is one, and torch's."""
    if request.param == "compiled" and not compiled.available():
        pytest.skip(compiled.explain())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(compiled, "available", lambda: False)
        yield


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31))
def test_rows_are_sorted_by_expert_stably_and_can_be_put_back(
    tokens: int, chosen: int, experts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts_NK = torch.randint(0, experts, (tokens, chosen), generator=generator)
    dispatch = make_dispatch(experts_NK, experts)
    flat = experts_NK.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda row: (flat[row], row))
    assert dispatch.order_R.tolist() == expected
    assert dispatch.inverse_R[dispatch.order_R].tolist() == list(range(len(flat)))
    assert dispatch.tokens_R.tolist() == [row // chosen for row in expected]
    assert dispatch.sizes == tuple(flat.count(expert) for expert in range(experts))
    assert (dispatch.num_tokens, dispatch.num_chosen, dispatch.num_experts) == (tokens, chosen, experts)


@pytest.mark.parametrize("wrong", [torch.tensor([[0, 4]]), torch.tensor([[-1, 0]])])
def test_an_expert_outside_the_range_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="from 0 to 3"):
        make_dispatch(wrong, 4)


def test_another_shape_or_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        make_dispatch(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="shape"):
        make_dispatch(torch.zeros(3, dtype=torch.long), 4)


@given(st.integers(0, 20), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_the_greatest_scores_are_chosen_and_differentiated(tokens: int, experts: int, chosen: int, seed: int) -> None:
    chosen = min(chosen, experts)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator).requires_grad_()
    sought = scores.detach().clone().requires_grad_()
    weights = torch.randn(tokens, chosen, generator=generator)
    (found, places), (expected, expected_places) = top_k(scores, chosen), sought.topk(chosen, dim=-1)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(found, expected) and torch.equal(places, expected_places)
    assert torch.equal(scores.grad, sought.grad)


def test_of_a_transposed_table_the_columns_are_rows() -> None:
    scores = torch.randn(7, 50).t()
    found, places = top_k(scores, 3)
    assert torch.equal(found, scores.topk(3).values) and torch.equal(scores.gather(-1, places), found)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(RuntimeError):
        top_k(torch.randn(3, 4), 5)


@pytest.mark.skipif(not compiled.available(), reason=compiled.explain())
def test_of_equal_scores_the_earlier_come_first() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [-torch.inf] * 5, [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert compiled.top_k(scores, 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.skipif(not compiled.available(), reason=compiled.explain())
@pytest.mark.parametrize("experts", [127, 128])
def test_of_many_experts_the_choice_is_that_of_a_stable_sort(experts: int) -> None:
    scores = torch.randint(0, 50, (200, experts)).float()  # many equals
    expected = [sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:3] for row in scores.tolist()]
    assert compiled.top_k(scores, 3).tolist() == expected


@pytest.mark.skipif(not compiled.available(), reason=compiled.explain())
def test_what_is_no_number_still_chooses_different_experts() -> None:
    scores = torch.randn(60, 9)
    scores[torch.rand(60, 9) < 0.5] = torch.nan
    scores[0] = torch.nan
    for row, places in zip(scores, compiled.top_k(scores, 3).tolist(), strict=True):
        assert len(set(places)) == 3 and set(places) <= set(range(9))
        assert int(row[places].isnan().sum()) == min(3, int(row.isnan().sum()))


@pytest.mark.skipif(not compiled.available(), reason=compiled.explain())
def test_threads_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(1000, 20)
    alone = compiled.top_k(scores, 2)
    monkeypatch.setattr(compiled, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(compiled.top_k(scores, 2), alone)
