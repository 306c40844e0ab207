"""The domain gate reads the prefix: causal, per document, the same in pieces as whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from mfext.config_gate import DomainGateConfig
from mfext.model.domain_gate import DomainGate

VOCABULARY = 20


def gate_and_tokens(length: int = 150, batch: int = 2) -> tuple[DomainGate, torch.Tensor]:
    gate = DomainGate(DomainGateConfig(d_embedding=6, d_convolution=8, d_hidden=5), VOCABULARY).double()
    return gate, torch.randint(0, VOCABULARY, (batch, length))


def brute_force(gate: DomainGate, ids: torch.Tensor, start: int, position: int) -> torch.Tensor:
    """The logit at `position` of one row whose document began at `start`, from the definition."""
    width, config = gate.config.convolution_width, gate.config
    embedded = gate.embedding(ids)
    features = []
    for at in range(start, position + 1):
        window = torch.zeros(config.d_embedding, width, dtype=torch.float64)
        for back in range(width):
            if at - back >= start:
                window[:, width - 1 - back] = embedded[at - back]
        features.append(torch.nn.functional.gelu(gate.convolution(window.flatten())))
    means = []
    for decay in (1.0, *config.decays):
        weights = [decay ** (position - at) for at in range(start, position + 1)]
        total = sum(weight * feature for weight, feature in zip(weights, features, strict=True))
        means.append(total / sum(weights))
    return gate.output(torch.nn.functional.gelu(gate.hidden(torch.cat(means))))[0]


@pytest.mark.parametrize(
    ("start", "position"), [(0, 0), (0, 3), (0, 63), (0, 64), (0, 149), (40, 40), (40, 100), (64, 130)]
)
def test_gate_equals_its_definition(start: int, position: int) -> None:
    gate, ids = gate_and_tokens()
    starts = torch.zeros_like(ids)
    starts[:, start:] = start
    logits, _ = gate(ids, starts)
    torch.testing.assert_close(logits[0, position], brute_force(gate, ids[0], start, position), rtol=1e-10, atol=1e-10)


def test_later_tokens_change_no_earlier_logit() -> None:
    gate, ids = gate_and_tokens()
    changed = ids.clone()
    changed[:, 70:] = (changed[:, 70:] + 1) % VOCABULARY
    starts = torch.zeros_like(ids)
    assert torch.equal(gate(ids, starts)[0][:, :70], gate(changed, starts)[0][:, :70])


@pytest.mark.parametrize("cuts", [(1,), (7, 64), (63, 65, 128), tuple(range(1, 150))])
def test_gate_in_pieces_equals_the_whole(cuts: tuple[int, ...]) -> None:
    gate, ids = gate_and_tokens()
    starts = torch.zeros_like(ids)
    starts[0, 30:] = 30
    starts[1, 100:] = 100
    whole, _ = gate(ids, starts)
    state, pieces = None, []
    for first, last in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        logits, state = gate(ids[:, first:last], starts[:, first:last], first, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)


def test_openness_is_exactly_zero_and_one_outside_its_thresholds() -> None:
    gate, _ = gate_and_tokens()
    probabilities = torch.tensor([0.0, 0.3, 0.5, 0.725, 0.95, 0.99])
    openness = gate.openness(torch.logit(probabilities))
    assert openness[:3].tolist() == [0.0, 0.0, 0.0] and openness[-2:].tolist() == [1.0, 1.0]
    assert 0 < openness[3] < 1


def test_a_gate_held_open_opens_on_every_token() -> None:
    gate, ids = gate_and_tokens()
    gate.requires_grad_(False)
    assert not gate.is_held_open
    gate.hold_open()
    assert gate.is_held_open
    assert bool((gate.openness(gate(ids, torch.zeros_like(ids))[0]) == 1).all())


def trained_a_step(gate: DomainGate) -> None:
    gate.requires_grad_()
    optimizer = torch.optim.AdamW(gate.output.parameters(), fused=True)
    ids = torch.zeros(1, 3, dtype=torch.long)
    gate(ids, ids)[0].sum().backward()
    optimizer.step()
    gate.requires_grad_(False)


def loaded(gate: DomainGate) -> None:
    gate.load_state_dict(DomainGate(gate.config, VOCABULARY).state_dict())


def replaced(gate: DomainGate) -> None:
    gate.load_state_dict(DomainGate(gate.config, VOCABULARY).state_dict(), assign=True)


@pytest.mark.parametrize("write", [trained_a_step, loaded, replaced, DomainGate.reset_parameters])
def test_whatever_writes_to_its_output_layer_ends_that(write: Callable[[DomainGate], None]) -> None:
    gate, _ = gate_and_tokens()
    gate.requires_grad_(False).hold_open()
    assert gate.is_held_open
    write(gate)
    assert not gate.is_held_open


def test_a_copy_of_a_gate_held_open_looks_for_itself() -> None:
    gate, ids = gate_and_tokens()
    gate.requires_grad_(False).hold_open()
    copied = copy.deepcopy(gate)
    assert bool((copied.openness(copied(ids, torch.zeros_like(ids))[0]) == 1).all())
    copied.reset_parameters()
    assert gate.is_held_open and not copied.is_held_open
