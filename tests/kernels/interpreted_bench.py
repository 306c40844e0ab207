"""The GPU bench's own comparison, in Triton's interpreter: green on these kernels, red on a wrong one.

Run by test_triton_interpreter.py in a process of its own; by hand: TRITON_INTERPRET=1 pytest <this file>.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.bench import gpu
from mfext_kernels.grouped_linear import triton as grouped_linear


def checked(name: str, dtype: torch.dtype) -> list[str]:
    chosen = [number for number, each in enumerate(gpu.checks(torch.device("cpu"))) if each[0].startswith(name)]
    assert chosen
    return [fault for number in chosen for fault in gpu.check(dtype, number, "cpu")]


@pytest.mark.parametrize(
    "name",
    ["decoding, C 20", "decoding, C 320", "expert", "attention in documents, C 20", "attention in documents, C 320"],
)
def test_the_bench_finds_no_fault_in_fp32(name: str) -> None:
    assert checked(name, torch.float32) == []


def test_the_bench_finds_a_kernel_that_is_one_per_cent_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = grouped_linear._sum_chosen

    def wrong(rows: Tensor, dispatch: object) -> Tensor:
        return right(rows, dispatch) * 1.01

    monkeypatch.setattr(grouped_linear, "_sum_chosen", wrong)
    found = checked("scatter", torch.float16)
    assert len(found) == 1 and "scatter_linear, torch.float16, output: off by" in found[0]
