"""The dispatch: sorted by expert, stable, and its own inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mfext_kernels.routing import make_dispatch


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
