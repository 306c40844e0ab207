"""The review stage: routers and gate alone move, by a pure function of the seed, and old text gains from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mfext.config import GateTraining, GrowthConfig, ReviewConfig
from mfext.errors import InputError
from mfext.growth.gate_training import train_gate
from mfext.growth.probes import Windows
from mfext.growth.review import Review, new_expert_mass, review
from mfext.model.moduleformer import ModuleFormer
from mfext.training.methods.review import Review as ReviewMethod
from tests.growth.tiny_growth import MODES, ascii_windows, bits, force_gate, grow, tiny_model, tokens, wake

every_mode = pytest.mark.parametrize("growth", MODES.values(), ids=MODES)
GATE = GateTraining(steps=20, batch_size=8)
SETTINGS = ReviewConfig(steps=4, batch_size=4, learning_rate=1e-2)
NEW, OLD = ascii_windows(65, 91, 24, 1), ascii_windows(97, 123, 24, 2)


def reviewed(growth: GrowthConfig, settings: ReviewConfig = SETTINGS, seed: int = 3) -> tuple[ModuleFormer, Review]:
    """A grown model whose new experts matter, and what a review of it says."""
    torch.manual_seed(11)
    model = tiny_model()
    growth = replace(growth, gate=GATE, review=settings)
    grow(model, "upper", growth)
    wake(model, 1)
    if growth.mode == "gated":
        train_gate(model, NEW, OLD, GATE, seed)
    return model, review(model, NEW, OLD, growth, seed)


@every_mode
def test_a_review_moves_routers_and_gate_of_the_newest_generation_and_no_other_bit(growth: GrowthConfig) -> None:
    model = tiny_model()
    growth = replace(growth, gate=GATE, review=SETTINGS)
    grow(model, "code", growth)
    wake(model, 1)
    grow(model, "upper", growth)
    wake(model, 2)
    if growth.mode == "gated":
        force_gate(model, 1, 1e9)
        train_gate(model, NEW, OLD, GATE, 3)
    before, wanted = bits(model), ReviewMethod().trainable(model)
    review(model, NEW, OLD, growth, 3)
    changed = {name for name, after in bits(model).items() if after != before[name]}
    assert changed <= wanted
    assert any("_router." in name for name in changed) or growth.mode == "gated"
    assert any(".gate." in name for name in changed) == (growth.mode == "gated")
    assert all(name.startswith("generations.1.") and ("_router." in name or ".gate." in name) for name in wanted)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_mode
def test_a_review_is_a_pure_function_of_its_seed(growth: GrowthConfig) -> None:
    (first, said), (again, repeated), (other, _) = reviewed(growth), reviewed(growth), reviewed(growth, seed=4)
    assert bits(first) == bits(again) != bits(other)
    assert replace(said, wall_s=0, gate=None) == replace(repeated, wall_s=0, gate=None)


@pytest.mark.parametrize("mode", ["side", "compete", "preserve"])
def test_a_review_lowers_the_loss_on_old_text_it_did_not_see(mode: str) -> None:
    _, said = reviewed(MODES[mode], replace(SETTINGS, steps=25, probe_share=0.75))
    assert said.old_after < said.old_before


@pytest.mark.parametrize("mode", ["side", "compete", "preserve"])
def test_the_penalty_takes_old_text_away_from_new_experts(mode: str) -> None:
    masses = []
    for penalty in (0.0, 100.0):
        model, _ = reviewed(MODES[mode], replace(SETTINGS, steps=25, learning_rate=0.1, penalty=penalty))
        masses.append(float(new_expert_mass(model, model(OLD.input_ids)).detach()))
    assert masses[1] < masses[0] / 2


def test_a_review_calibrates_the_gate_to_the_budget_anew_and_keeps_configs_in_step() -> None:
    model, said = reviewed(MODES["gated"])
    assert said.gate is not None and said.gate.false_open <= GATE.max_false_open + 1 / (6 * 64)
    gate = model.generation(1).gate
    assert gate is not None and model.config.generations[0].gate == gate.config
    assert (gate.config.opens_at, gate.config.full_at) == (said.gate.opens_at, said.gate.full_at)
    assert (model(OLD.input_ids).gates > 0).double().mean() < 0.1


@pytest.mark.parametrize("mode", ["side", "compete", "preserve"])
def test_modes_without_a_gate_report_none(mode: str) -> None:
    assert reviewed(MODES[mode])[1].gate is None


def test_a_generation_that_is_closed_or_never_chosen_has_no_mass() -> None:
    model = tiny_model()
    grow(model, "code", MODES["gated"])
    force_gate(model, 1, -1e9)
    assert new_expert_mass(model, model(tokens())) == 0
    model = tiny_model()
    grow(model, "code", replace(MODES["preserve"], new_router_bias=-1e4))
    assert new_expert_mass(model, model(tokens())) == 0


def test_mass_of_an_open_gate_counts_the_gates_given_to_its_experts() -> None:
    model = tiny_model()
    grow(model, "code", MODES["gated"])
    force_gate(model, 1, 1e9)
    output = model(tokens())
    sums = [routing.gates_MK.sum(1).mean() for routing in output.routings if routing.generation == 1]
    torch.testing.assert_close(new_expert_mass(model, output), torch.stack(sums).mean())


def test_padding_is_not_scored() -> None:
    padded_ids = torch.cat([NEW.input_ids, torch.full((24, 9), 257)], dim=1)
    padded = Windows(padded_ids, torch.zeros_like(padded_ids))
    results = []
    for windows in (NEW, padded):
        model = tiny_model()
        growth = replace(MODES["side"], review=replace(SETTINGS, steps=1))
        grow(model, "upper", growth)
        results.append(review(model, windows, OLD, growth, 3).new_before)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_review_says_what_it_lacks() -> None:
    model = tiny_model()
    growth = replace(MODES["side"], review=SETTINGS)
    with pytest.raises(InputError, match="nothing to review"):
        review(model, NEW, OLD, growth, 1)
    with pytest.raises(InputError, match="nothing to review"):
        ReviewMethod().trainable(model)
    grow(model, "upper", growth)
    with pytest.raises(InputError, match="at least 8"):
        review(model, NEW, OLD.take(torch.arange(3)), growth, 1)
    with pytest.raises(InputError, match="at least 1 step"):
        review(model, NEW, OLD, replace(growth, review=ReviewConfig()), 1)


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"batch_size": 1}, {"probe_share": 1.0}, {"learning_rate": 0.0}])
def test_a_review_that_makes_no_sense_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SETTINGS, **wrong)
