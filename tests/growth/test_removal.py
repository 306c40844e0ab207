"""Generations leave whole: what is left is exactly the model with them shut, and they come back to the same bits."""

from __future__ import annotations

import json

import pytest
import torch

from mfext.errors import InputError
from mfext.growth.masking import MOST_DIFFERENCE, prove_removal
from mfext.growth.plan import count_parameters
from mfext.growth.removal import (
    RemovedGenerations,
    leave_last,
    plan_removal,
    remove_generations,
    removed_names,
    restore_generations,
)
from mfext.model.moduleformer import ModuleFormer
from tests.growth.tiny_growth import MODES, bits, force_gate, grow, tiny_model, tokens, train_new, wake

LINEAGES = {
    "gated": ("gated", "gated", "gated"),
    "side": ("side", "gated", "side"),
    "compete": ("compete", "gated", "compete"),
    "preserve": ("preserve", "preserve", "side"),
}


def grown(modes: tuple[str, ...]) -> ModuleFormer:
    """Generations a, b and c whose weights matter, gates open."""
    model = tiny_model()
    for number, (name, mode) in enumerate(zip("abc", modes, strict=True), 1):
        grow(model, name, MODES[mode])
        wake(model, number)
        if mode == "gated":
            force_gate(model, number, 1e9)
    return model


def copy_of(model: ModuleFormer) -> ModuleFormer:
    twin = ModuleFormer(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("names", [("c",), ("b",), ("a",), ("a", "c"), ("a", "b", "c")])
@pytest.mark.parametrize("lineage", LINEAGES)
@torch.no_grad()
def test_what_is_left_is_the_model_with_them_shut_and_they_come_back_bit_for_bit(
    lineage: str, names: tuple[str, ...]
) -> None:
    full = grown(LINEAGES[lineage])
    model, before, logits = copy_of(full), bits(full), full(tokens()).logits
    plan = plan_removal(full.config, names)
    removed = remove_generations(model, plan)
    assert removed_names(plan) == tuple(sorted(names, reverse=True))
    assert [each.name for each in model.config.generations] == [name for name in "abc" if name not in names]
    assert sum(each.numel() for each in model.parameters()) == count_parameters(model.config).total
    assert not torch.equal(model(tokens()).logits, logits)
    difference = prove_removal(full, model, plan, tokens())
    assert difference <= MOST_DIFFERENCE and bits(full) == before
    if lineage == "gated":
        assert difference == 0.0
    tensors, facts = removed.to_parts()
    restore_generations(model, RemovedGenerations.from_parts(tensors, json.loads(json.dumps(facts))))
    assert bits(model) == before and model.config == full.config
    assert torch.equal(model(tokens()).logits, logits)
    assert not any(each.requires_grad for name, each in model.named_parameters() if name in tensors)


@torch.no_grad()
def test_the_newest_that_leave_give_back_the_model_before_them_bit_for_bit() -> None:
    model = tiny_model()
    grow(model, "a")
    wake(model, 1)
    before, config, logits = bits(model), model.config, model(tokens()).logits
    for name in ("b", "c"):
        grow(model, name, MODES["side"])
        with torch.enable_grad():
            train_new(model, 2)
    plan = plan_removal(model.config, ("b", "c"))
    assert leave_last(plan) and not leave_last(plan_removal(model.config, ("b",)))
    remove_generations(model, plan)
    assert bits(model) == before and model.config == config and torch.equal(model(tokens()).logits, logits)


def test_a_shut_gate_makes_a_middle_generation_leave_without_a_trace() -> None:
    model = grown(LINEAGES["gated"])
    force_gate(model, 2, -1e9)
    with torch.no_grad():
        logits = model(tokens()).logits
        remove_generations(model, plan_removal(model.config, ("b",)))
        assert torch.equal(model(tokens()).logits, logits)


def test_generations_grown_since_stand_behind_those_that_come_back() -> None:
    model = grown(LINEAGES["gated"])
    kept = bits(model)
    removed = remove_generations(model, plan_removal(model.config, ("b",)))
    grow(model, "d", MODES["side"])
    wake(model, 3)
    own = bits(model)
    restore_generations(model, removed)
    assert [each.name for each in model.config.generations] == ["a", "b", "c", "d"]
    restored = bits(model)
    assert {name: value for name, value in restored.items() if not name.startswith("generations.3.")} == kept
    assert all(
        restored[name.replace("generations.2.", "generations.3.")] == value
        for name, value in own.items()
        if name.startswith("generations.2.")
    )


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = grown(LINEAGES["gated"])
    with pytest.raises(InputError, match=r"no generation 'bb'.*it has a, b, c"):
        plan_removal(model.config, ("a", "bb"))
    with pytest.raises(InputError, match="none beyond its base"):
        plan_removal(tiny_model().config, ("a",))
    removed = remove_generations(model, plan_removal(model.config, ("b",)))
    grow(model, "b")
    before = bits(model)
    with pytest.raises(InputError, match="do not fit"):
        restore_generations(model, removed)
    with pytest.raises(InputError, match="do not fit"):
        restore_generations(grown(LINEAGES["gated"]), removed)
    short = RemovedGenerations(removed.before, removed.names, dict(list(removed.tensors.items())[1:]))
    remove_generations(model, plan_removal(model.config, ("b",)))
    with pytest.raises(InputError, match="tensors of generation 'b'"):
        restore_generations(model, short)
    assert {name: value for name, value in before.items() if not name.startswith("generations.2.")} == bits(model)
