"""The compiled pass over sticks beside torch's, which takes its place where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfext_kernels.stickbreaking import compiled_sticks, stickbreaking_attention
from mfext_kernels.stickbreaking.blocks import Plan
from tests.kernels.comparison import forward_and_gradients
from tests.kernels.test_stickbreaking import compare, packed_starts, queries_keys_values, small_blocks

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_sticks, "applies", lambda queries, plan: False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_it_is_built_where_there_is_a_compiler() -> None:
    assert compiled_sticks.available(), compiled_sticks.explain()


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("length", [1, 65, 300])
def test_the_torch_pass_agrees_in_single_precision_too(length: int) -> None:
    inputs = queries_keys_values(2, length, length + 7, torch.float32)
    compare(inputs, None)
    compare(inputs, packed_starts(2, length))


@pytest.mark.parametrize("starts", [None, torch.tensor([[0] * 3 + [6] * 2, [3] * 5])])
def test_it_agrees_over_many_small_blocks_and_tiles(starts: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    monkeypatch.setattr(compiled_sticks, "QUERIES", 2)
    compare(queries_keys_values(2, 5, 8, torch.float32), starts)


@pytest.mark.parametrize("chosen", [1, 3, 8, 9])
def test_any_number_of_chosen_experts_agrees(chosen: int) -> None:
    """Nine make blocks of more rows than the compiled pass holds: torch's takes them."""
    q, k, v = queries_keys_values(1, 70, 70, torch.float32)
    compare((torch.randn(1, 70, chosen, *q.shape[3:]), k, v), None)


def test_what_lies_in_fresh_memory_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = Plan.scratch

    def poisoned(plan: Plan, like: Tensor, num_keys: int, count: int) -> list[Tensor]:
        return [buffer.fill_(float("nan")) for buffer in clean(plan, like, num_keys, count)]

    monkeypatch.setattr(Plan, "scratch", poisoned)
    compare(queries_keys_values(2, 130, 140, torch.float32), packed_starts(2, 130))


@pytest.mark.usefixtures("two_threads")
def test_two_threads_share_the_work_and_agree_with_one() -> None:
    inputs = queries_keys_values(3, 300, 300, torch.float32)
    shared = forward_and_gradients(stickbreaking_attention, inputs)
    torch.set_num_threads(1)
    for one, other in zip(forward_and_gradients(stickbreaking_attention, inputs), shared, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_not_a_number_in_a_query_reaches_its_own_output_alone() -> None:
    q, k, v = queries_keys_values(1, 100, 100, torch.float32)
    q[0, 50] = float("nan")
    out = stickbreaking_attention(q, k, v)
    assert out[0, 50].isnan().all()
    assert out[0, :50].isfinite().all() and out[0, 51:].isfinite().all()


def test_without_it_the_numbers_are_the_same_but_for_rounding() -> None:
    code = (
        "import torch; from mfext_kernels.stickbreaking import compiled_sticks, stickbreaking_attention as attend\n"
        "torch.manual_seed(0); q, k, v = (torch.randn(1, 90, *shape, 8) for shape in ((2, 2), (2,), (2,)))\n"
        "print(compiled_sticks.available(), attend(q, k, v).double().norm().item())"
    )
    printed = []
    for changes in ({}, {"MFEXT_NATIVE": "0"}):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")} | changes
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        printed.append(done.stdout.split())
    assert [each[0] for each in printed] == ["True", "False"]
    assert float(printed[0][1]) == pytest.approx(float(printed[1][1]), rel=1e-6)
