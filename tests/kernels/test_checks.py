"""The quick self-check: green on these kernels, red on a wrong one."""

from __future__ import annotations

import pytest
import torch

from mfext_kernels import self_check
from mfext_kernels.stickbreaking import cpu


def test_every_op_passes_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    results = self_check()
    assert [result.name for result in results if not result.passed] == []
    assert len(results) == 6
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel_turns_its_check_red(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = cpu.stickbreaking_attention
    monkeypatch.setattr(cpu, "stickbreaking_attention", lambda *inputs: right(*inputs) * factor)
    by_name = {result.name: result for result in self_check()}
    assert not by_name["stickbreaking_attention"].passed
    assert by_name["expert_feedforward"].passed
