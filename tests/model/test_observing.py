"""The sizes of experts' outputs, against one expert at a time on one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mfext.model.attention as attention
import mfext.model.feedforward as feedforward
from mfext.config import GrowthMode
from mfext.model.cache import Cache
from mfext.model.experts import AttentionExperts, FeedForwardExperts
from mfext.model.language_model import LanguageModel
from mfext.model.moduleformer import ModuleFormer
from mfext.model.observing import observing
from mfext.model.router import Routing
from tests.growth.tiny_growth import MODES, force_gate, grow, tiny_model, tokens, wake

Seen = list[tuple[Routing, Tensor]]


def of_expert(stacks: Sequence[Any], number: int) -> dict[str, Tensor]:
    """The matrices of one expert, numbered over the stacks."""
    for stack in stacks:
        first = next(stack.parameters())
        if number < first.shape[0]:
            return {name: parameter[number] for name, parameter in stack.named_parameters()}
        number -= first.shape[0]
    raise AssertionError(number)


def output(stacks: Sequence[Any], expert: int, row: Tensor) -> Tensor:
    """What one expert makes of one token's row: a row of activations, or of values its own query attended."""
    matrices = of_expert(stacks, expert)
    if "output" in matrices:
        return row @ matrices["output"]
    return F.gelu(row @ matrices["up"], approximate="tanh") @ matrices["down"]


def spy(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Every call of the mixing functions, with the norms that a loop over tokens and choices finds."""
    seen: Seen = []

    def spied(module: Any, name: str) -> None:
        real: Callable[..., Tensor] = getattr(module, name)

        def mix(rows: Tensor, stacks: Sequence[AttentionExperts | FeedForwardExperts], routing: Routing) -> Tensor:
            norms_MK = torch.zeros(routing.experts_MK.shape)
            for token, experts in enumerate(routing.experts_MK.tolist()):
                for slot, expert in enumerate(experts):
                    row = rows[token, slot] if rows.dim() == 3 else rows[token]
                    norms_MK[token, slot] = output(stacks, expert, row).norm()
            seen.append((routing, norms_MK))
            return real(rows, stacks, routing)

        monkeypatch.setattr(module, name, mix)

    spied(attention, "mix_outputs")
    spied(feedforward, "mix_feedforward")
    return seen


def grown(mode: GrowthMode | None) -> ModuleFormer:
    model = tiny_model()
    if mode is not None:
        grow(model, "code", MODES[mode])
        wake(model, 1)
    return model


@pytest.mark.parametrize("mode", [None, "gated", "side", "compete", "preserve"])
def test_norms_are_those_of_a_loop_over_tokens_and_experts(
    mode: GrowthMode | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grown(mode)
    seen = spy(monkeypatch)
    with torch.inference_mode(), observing(model):
        routings = model(tokens(batch=2, length=12)).routings
    assert len(routings) == len(seen) == (8 if mode in ("gated", "side") else 4)
    for routing, (mixed, expected_MK) in zip(routings, seen, strict=True):
        norms_MK = routing.output_norms_MK
        assert norms_MK is not None and norms_MK.shape == routing.experts_MK.shape
        real_MK = routing.experts_MK < routing.num_experts
        assert (norms_MK[~real_MK] == 0).all() and real_MK.any()
        torch.testing.assert_close(norms_MK[real_MK], expected_MK.flatten(), rtol=1e-5, atol=1e-6)
        assert torch.equal(routing.experts_MK[real_MK], mixed.experts_MK.flatten())


def test_a_gate_open_on_some_tokens_measures_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = grown("gated")
    gate = model.generation(1).gate
    assert gate is not None
    whole = gate.openness
    monkeypatch.setattr(gate, "openness", lambda logits_BT: whole(logits_BT) * (torch.arange(12) % 3 == 0))
    force_gate(model, 1, 50.0)
    seen = spy(monkeypatch)
    with torch.inference_mode(), observing(model):
        routings = model(tokens(batch=2, length=12)).routings
    assert {len(routing.experts_MK) for routing in routings if routing.generation} == {8}
    for routing, (_, expected_MK) in zip(routings, seen, strict=True):
        assert routing.output_norms_MK is not None
        torch.testing.assert_close(routing.output_norms_MK, expected_MK, rtol=1e-5, atol=1e-6)


def logits_of(model: LanguageModel, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, tuple[Routing, ...]]:
    with torch.inference_mode():
        output = model(ids, cache=cache)
    return output.logits, output.routings


@pytest.mark.parametrize("mode", [None, "gated", "side", "compete", "preserve"])
def test_observing_changes_no_logit_and_ends_where_it_ends(mode: GrowthMode | None) -> None:
    model, ids = grown(mode), tokens()
    before, plain = logits_of(model, ids)
    with observing(model):
        during, routings = logits_of(model, ids)
    after, again = logits_of(model, ids)
    assert torch.equal(before, during) and torch.equal(before, after)
    assert all(routing.output_norms_MK is not None for routing in routings)
    assert all(routing.output_norms_MK is None for routing in (*plain, *again))
    with pytest.raises(RuntimeError), observing(model):
        raise RuntimeError
    assert not model.observed


def test_where_every_choice_is_null_the_norms_are_zero() -> None:
    model = tiny_model()
    grow(model, "code", replace(MODES["side"], attention_experts_per_token=1, feedforward_experts_per_token=1))
    wake(model, 1)
    with torch.no_grad():
        for name, parameter in model.generation(1).named_parameters():
            if name.endswith("router.hidden.bias"):
                parameter.fill_(30.0)
            if name.endswith("router.output.weight"):
                parameter.zero_()[-1] = 1
    with observing(model):
        _, routings = logits_of(model, tokens())
    new = [routing for routing in routings if routing.generation]
    assert len(new) == 4
    for routing in new:
        assert (routing.experts_MK == routing.num_experts).all()
        assert routing.output_norms_MK is not None and not routing.output_norms_MK.any()


def test_a_decoding_step_says_how_large_outputs_were_where_it_is_observed() -> None:
    model, ids = grown(None), tokens(batch=1, length=9)
    cache = model.new_cache(1, 16)
    logits_of(model, ids[:, :8], cache)
    with observing(model):
        _, routings = logits_of(model, ids[:, 8:], cache)
        _, whole = logits_of(model, ids)
    assert len(routings) == 4
    for routing, full in zip(routings, whole, strict=True):
        assert routing.output_norms_MK is not None and full.output_norms_MK is not None
        torch.testing.assert_close(routing.output_norms_MK, full.output_norms_MK[-1:], rtol=1e-4, atol=1e-5)


def test_a_training_forward_takes_no_gradient_of_the_norms() -> None:
    model = grown("gated").requires_grad_(True)
    model.set_gradient_checkpointing(True)
    with observing(model):
        output = model(tokens(batch=1, length=8))
    assert all(routing.output_norms_MK is not None for routing in output.routings)
    assert not any(routing.output_norms_MK.requires_grad for routing in output.routings)
    output.logits.sum().backward()
