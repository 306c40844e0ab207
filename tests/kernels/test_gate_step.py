"""One token through a domain gate in compiled code beside the same in torch."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mfext.config_gate import DomainGateConfig
from mfext.model import domain_gate
from mfext.model.domain_gate import DomainGate, GateState
from mfext_kernels import gate_step

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")

VOCABULARY = 20
PLAIN = DomainGateConfig()
SHAPES = [
    PLAIN,
    replace(PLAIN, d_embedding=5, d_convolution=7, d_hidden=3),
    replace(PLAIN, d_embedding=1, convolution_width=1, d_convolution=1, d_hidden=1, decays=()),
]
# Where each row's document begins: at once, with the token itself, some tokens ago, and after padding that goes on.
OFFSET, STARTS = 6, torch.tensor([[0], [6], [3], [8]])


def case(config: DomainGateConfig) -> tuple[DomainGate, Tensor, GateState]:
    gate, rows = DomainGate(config, VOCABULARY), len(STARTS)
    state = gate.new_state(rows)
    state = GateState(torch.randn_like(state.tail_BWE), torch.randn_like(state.sums_MBC))
    return gate, torch.randint(0, VOCABULARY, (rows, 1)), state


def step(gate: DomainGate, ids_B1: Tensor, state: GateState) -> tuple[Tensor, ...]:
    with torch.no_grad():
        logits_B1, after = gate(ids_B1, STARTS, OFFSET, state)
    return logits_B1, after.tail_BWE, after.sums_MBC


@pytest.mark.parametrize("config", SHAPES)
def test_a_compiled_step_is_the_step_in_torch(config: DomainGateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gate_step.available(), gate_step.explain()
    gate, ids, state = case(config)
    before = state.tail_BWE.clone(), state.sums_MBC.clone()
    found = step(gate, ids, state)
    assert torch.equal(state.tail_BWE, before[0]) and torch.equal(state.sums_MBC, before[1])
    monkeypatch.setattr(domain_gate, "applies", lambda *given: False)
    for ours, expected in zip(found, step(gate, ids, state), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)


def test_what_lies_in_fresh_memory_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, ids, state = case(PLAIN)
    clean, room, new = step(gate, ids, state), torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *of, **named: room(*of, **named).fill_(torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *of, **named: new(self, *of, **named).fill_(torch.nan))
    for one, other in zip(step(gate, ids, state), clean, strict=True):
        assert torch.equal(one, other)


def test_a_rows_bits_are_those_of_the_row_alone() -> None:
    gate, ids, state = case(PLAIN)
    logits_B1, _, sums_MBC = step(gate, ids, state)
    for row in range(len(STARTS)):
        own, tensors = slice(row, row + 1), gate._tensors()
        given = (ids[own, 0], OFFSET - STARTS[own, 0], state.tail_BWE[own], state.sums_MBC[:, own])
        with torch.no_grad():
            logits_1, _, sums_M1C = gate_step.gate_step(tensors, *given)
        assert torch.equal(logits_1, logits_B1[row]) and torch.equal(sums_M1C, sums_MBC[:, own])


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int) -> None:
    gate, ids, state = case(PLAIN)
    ids[2] = wrong
    with pytest.raises(IndexError, match=f"from 0 to {VOCABULARY - 1}"):
        step(gate, ids, state)


def test_what_trains_or_is_of_other_precision_goes_by_torch() -> None:
    gate, ids, _ = case(PLAIN)
    tensors = gate._tensors()
    assert not gate_step.applies(tensors, ids[:, 0])
    with torch.no_grad():
        assert gate_step.applies(tensors, ids[:, 0])
        assert not gate_step.applies(gate.double()._tensors(), ids[:, 0])
