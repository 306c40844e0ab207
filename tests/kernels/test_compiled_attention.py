"""Compiled attention beside torch's, which takes its place where there is no compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfext_kernels.stickbreaking import compiled, stickbreaking_attention
from tests.kernels.comparison import forward_and_gradients
from tests.kernels.test_stickbreaking import compare, packed_starts, queries_keys_values

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "applies", lambda queries: False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_it_is_built_where_there_is_a_compiler() -> None:
    assert compiled.available(), compiled.explain()


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("length", [1, 65, 300])
def test_torch_agrees_in_single_precision_too(length: int) -> None:
    inputs = queries_keys_values(2, length, length + 7, torch.float32)
    compare(inputs, None)
    compare(inputs, packed_starts(2, length))


@pytest.fixture
def built_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Builds it anew with more flags."""

    def build_anew(*flags: str) -> None:
        source = replace(compiled.SOURCE, flags=(*compiled.SOURCE.flags, *flags))
        monkeypatch.setattr(compiled, "SOURCE", source)
        assert source.available(), source.explain()

    return build_anew


@pytest.mark.parametrize("starts", [None, torch.tensor([[0] * 3 + [6] * 2, [3] * 5])])
def test_it_agrees_over_many_small_blocks_and_tiles(starts: Tensor | None, built_with: Callable[..., None]) -> None:
    built_with("-DQUERIES=2", "-DKEYS=3")
    compare(queries_keys_values(2, 5, 8, torch.float32), starts)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86 processors")
@pytest.mark.parametrize("without", [["-mno-avx512f"], ["-mno-avx512f", "-mno-avx"], ["-ffp-contract=off"]])
def test_narrower_vectors_agree(without: list[str], built_with: Callable[..., None]) -> None:
    built_with(*without)
    compare(queries_keys_values(2, 130, 140, torch.float32), packed_starts(2, 130))


@pytest.mark.parametrize("width", [1, 16, 20, 64, 300])
def test_any_width_of_heads_agrees(width: int) -> None:
    q, k, v = (torch.randn(2, 70, *shape, width) for shape in ((2, 3), (3,), (3,)))
    compare((q, k, v), None)


@pytest.mark.parametrize("chosen", [1, 3, 8, 9])
def test_any_number_of_chosen_experts_agrees(chosen: int) -> None:
    """Nine make blocks of more rows than it holds: torch takes them."""
    q, k, v = queries_keys_values(1, 70, 70, torch.float32)
    compare((torch.randn(1, 70, chosen, *q.shape[3:]), k, v), None)


def test_what_lies_in_fresh_memory_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_room", lambda numbers: torch.full((numbers,), torch.nan))
    clean = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *given, **named: clean(*given, **named).fill_(torch.nan))
    compare(queries_keys_values(2, 130, 140, torch.float32), packed_starts(2, 130))


def test_nothing_to_attend_is_no_fault() -> None:
    for shape in ((0, 3, 2, 2, 4), (2, 0, 2, 2, 4)):
        q = torch.randn(shape)
        keys = torch.randn(shape[0], 5, *shape[3:])
        compare((q, keys, keys.clone()), None)


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
        "import torch; from mfext_kernels.stickbreaking import compiled, stickbreaking_attention as attend\n"
        "torch.manual_seed(0); q, k, v = (torch.randn(1, 90, *shape, 8) for shape in ((2, 2), (2,), (2,)))\n"
        "print(compiled.available(), attend(q, k, v).double().norm().item())"
    )
    printed = []
    for changes in ({}, {"MFEXT_NATIVE": "0"}):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")} | changes
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        printed.append(done.stdout.split())
    assert [each[0] for each in printed] == ["True", "False"]
    assert float(printed[0][1]) == pytest.approx(float(printed[1][1]), rel=1e-6)
