"""Growth's promises on a tiny model: identity, frozen bits, exact detach, several growths in a row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mfext.config import GateTraining, GrowthConfig
from mfext.errors import InputError
from mfext.growth.apply import apply_plan, freeze, hold_gate_open, measure_usage, set_gate_thresholds, set_trainable
from mfext.growth.gate_training import train_gate
from mfext.growth.plan import AddExperts, FreezeExperts, RemoveExperts, count_parameters, plan_detach, plan_growth
from mfext.growth.probes import document_starts, open_set_negatives, self_probes
from mfext.model.router import Site
from tests.growth.tiny_growth import (
    COMPETE,
    GROWTH,
    MODES,
    TINY,
    ascii_windows,
    bits,
    force_gate,
    grow,
    tiny_model,
    tokens,
    train_new,
    wake,
)


@pytest.mark.parametrize("openness", [1e9, 0.0])
def test_a_gated_growth_starts_as_the_identity_even_with_its_gate_open(openness: float) -> None:
    model = tiny_model()
    before = model(tokens()).logits
    grow(model, "code")
    force_gate(model, 1, openness)
    assert torch.equal(model(tokens()).logits, before)


def test_a_gate_held_open_gives_the_bits_of_one_that_is_asked_about_every_token() -> None:
    model = tiny_model()
    grow(model, "code")
    wake(model, 1)
    force_gate(model, 1, 1e9)
    asked = model(tokens())
    hold_gate_open(model.requires_grad_(False))
    held = model(tokens())
    (generation,) = model.generations
    assert generation.gate.is_held_open
    assert torch.equal(held.logits, asked.logits)
    assert held.gates is not None and asked.gates is not None and torch.equal(held.gates, asked.gates)


def test_a_competing_growth_changes_old_logits_and_says_how_much() -> None:
    model = tiny_model()
    before = model(tokens()).logits
    grow(model, "code", COMPETE)
    difference = (model(tokens()).logits - before).abs().mean()
    assert 0 < difference < 0.02, "new experts take gate mass from old ones, but start with little of it"


def test_closed_gate_gives_the_base_bit_for_bit_whatever_the_generation_learned() -> None:
    model = tiny_model()
    before = model(tokens()).logits
    grow(model, "code")
    wake(model, 1)
    force_gate(model, 1, -1e9)
    assert torch.equal(model(tokens()).logits, before)


def test_tokens_before_the_gate_opens_are_the_bases() -> None:
    """To rounding: an expert's product may depend, in a row's last bit, on how many rows it is given."""
    model = tiny_model().double()
    ids = tokens(batch=2)
    before = model(ids).logits
    grow(model, "code")
    wake(model, 1)
    gate = model.generation(1).gate
    assert gate is not None
    logits, _ = gate(ids, torch.zeros_like(ids))
    opens_at = float(logits.detach().sigmoid().quantile(0.8))
    set_gate_thresholds(model, opens_at, min(1.0, opens_at + 0.05))
    output = model(ids)
    assert output.gates is not None
    opened = (output.gates[..., 0] > 0).int().cummax(1).values.bool()
    assert opened.any() and not opened.all(), "the example must hold both kinds of token"
    torch.testing.assert_close(output.logits[~opened], before[~opened], rtol=1e-12, atol=1e-12)


def test_open_tokens_of_some_rows_equal_the_same_rows_alone() -> None:
    model = tiny_model().double()
    grow(model, "code")
    wake(model, 1)
    ids = tokens(batch=4)
    gate = model.generation(1).gate
    assert gate is not None
    opens_at = float(gate(ids, torch.zeros_like(ids))[0].detach().sigmoid().median())
    set_gate_thresholds(model, opens_at, min(1.0, opens_at + 0.02))
    together = model(ids).logits
    alone = torch.cat([model(ids[row : row + 1]).logits for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("growth", MODES.values(), ids=MODES)
def test_training_with_weight_decay_moves_no_frozen_bit(growth: GrowthConfig) -> None:
    model = tiny_model()
    grow(model, "code", growth)
    if growth.mode == "gated":
        force_gate(model, 1, 1e9)
    before = bits(model)
    train_new(model)
    after = bits(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed, "the new generation must have learned something"
    assert all(name.startswith("generations.0.") for name in changed)


def test_two_growths_then_detach_give_back_the_model_after_the_first() -> None:
    model = tiny_model()
    grow(model, "code")
    force_gate(model, 1, 1e9)
    train_new(model)
    first_bits, first_config, first_logits = bits(model), model.config, model(tokens()).logits
    grow(model, "math")
    force_gate(model, 2, 1e9)
    train_new(model)
    assert not torch.equal(model(tokens()).logits, first_logits)
    apply_plan(model, plan_detach(model.config))
    assert bits(model) == first_bits and model.config == first_config
    assert torch.equal(model(tokens()).logits, first_logits)


def test_new_tensors_share_no_memory_with_old_ones() -> None:
    model = tiny_model()
    old = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    grow(model, "code")
    new = {parameter.untyped_storage().data_ptr() for parameter in model.generation(1).parameters()}
    assert not old & new


def test_growth_leaves_nothing_old_trainable() -> None:
    model = tiny_model()
    grow(model, "code")
    assert all(
        not parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith("generations.")
    )
    freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_copied_experts_are_the_busiest_ones() -> None:
    model = tiny_model()
    usage = measure_usage(model, tokens())
    site = Site(1, "feedforward")
    usage[site] = torch.tensor([0.1, 0.7, 0.3, 0.9])
    old = model.blocks[1].feedforward.experts.up
    apply_plan(model, plan_growth(model.config, GROWTH, "code"), usage)
    new = model.generation(1).layers[1].feedforward.up
    assert torch.equal(new, old[torch.tensor([3, 1, 2])])


def test_a_plan_counts_what_the_model_will_hold() -> None:
    model = tiny_model()
    plan = plan_growth(model.config, GROWTH, "code")
    assert [type(each) for each in plan.operations] == [FreezeExperts, AddExperts]
    before = sum(parameter.numel() for parameter in model.parameters())
    apply_plan(model, plan)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert plan.parameters()["before"] == before and plan.parameters()["after"] == after
    assert count_parameters(plan.after).generations == (after - before,)
    assert 0 < count_parameters(plan.after).active_per_token < after
    assert [type(each) for each in plan_detach(model.config).operations] == [RemoveExperts]


def test_plans_refuse_what_does_not_fit() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="nothing to detach"):
        plan_detach(model.config)
    with pytest.raises(InputError, match="numbered 0 to 1"):
        plan_growth(model.config, replace(GROWTH, layers=(7,)), "code")
    plan = plan_growth(model.config, GROWTH, "code")
    apply_plan(model, plan)
    with pytest.raises(InputError, match="exists"):
        plan_growth(model.config, GROWTH, "code")
    with pytest.raises(InputError, match="another configuration"):
        apply_plan(model, plan)
    with pytest.raises(InputError, match="no parameter"):
        set_trainable(model, {"nothing.like.this"})


def test_growing_only_the_top_half_adds_nothing_below() -> None:
    model = tiny_model()
    grow(model, "code", replace(GROWTH, layers="top_half"))
    generation = model.config.generations[0]
    assert generation.attention_experts == (0, 2) and generation.feedforward_experts == (0, 3)


def test_a_trained_gate_opens_on_its_domain_and_stays_closed_elsewhere() -> None:
    model = tiny_model()
    grow(model, "upper")
    settings = GateTraining(
        steps=60, batch_size=16, max_false_open=0.02, negatives_share=0
    )  # letters at random have no order to learn
    calibration = train_gate(model, ascii_windows(65, 91, 64, 1), ascii_windows(97, 123, 64, 2), settings, seed=3)
    assert calibration.false_open <= 0.02
    assert calibration.false_close < 0.2
    assert model.config.generations[0].gate == model.generation(1).gate.config
    assert not any(parameter.requires_grad for parameter in model.generation(1).gate.parameters())
    gates = model(ascii_windows(97, 123, 8, 9).input_ids).gates
    assert (gates > 0).double().mean() < 0.1


def test_gate_training_is_a_pure_function_of_its_seed() -> None:
    def trained() -> tuple[dict[str, bytes], object]:
        model = tiny_model()
        torch.manual_seed(11)
        grow(model, "upper")
        settings = GateTraining(steps=5, batch_size=8)
        calibration = train_gate(model, ascii_windows(65, 91, 16, 1), ascii_windows(97, 123, 16, 2), settings, seed=3)
        return bits(model), (calibration.opens_at, calibration.false_open)

    assert trained() == trained()


def test_gate_training_needs_examples_and_a_gate() -> None:
    model = tiny_model()
    few = ascii_windows(65, 91, 3, 1)
    with pytest.raises(InputError, match="grow with mode gated"):
        train_gate(model, few, few, GateTraining(), 1)
    grow(model, "upper")
    with pytest.raises(InputError, match="at least 8"):
        train_gate(model, few, few, GateTraining(), 1)


def test_probes_come_from_the_model_and_leave_every_bit_in_place() -> None:
    model = tiny_model()
    grow(model, "code")
    before = bits(model)
    probes = self_probes(model, 6, 24, seed=1)
    assert probes.input_ids.shape == (6, 24)
    assert bits(model) == before
    again = self_probes(model, 6, 24, seed=1)
    assert torch.equal(probes.input_ids, again.input_ids)


def test_document_starts_follow_the_last_bos() -> None:
    bos = TINY.bos_id
    ids = torch.tensor([[bos, 1, 2, bos, 3], [1, 2, bos, 3, 4]])
    assert document_starts(ids, bos).tolist() == [[0, 0, 0, 3, 3], [0, 0, 2, 2, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_open_set_negatives_keep_special_tokens_in_place_and_make_none(seed: int) -> None:
    windows = ascii_windows(65, 91, 16, seed)
    windows.input_ids[:, 20] = TINY.bos_id
    special = {TINY.bos_id, TINY.pad_id}
    made = open_set_negatives(windows, TINY.vocab_size, special, torch.Generator().manual_seed(seed)).input_ids
    was_special = torch.isin(windows.input_ids, torch.tensor(sorted(special)))
    assert torch.equal(made[was_special], windows.input_ids[was_special])
    assert not torch.isin(made[~was_special], torch.tensor(sorted(special))).any()


@pytest.mark.parametrize("growth", MODES.values(), ids=MODES)
def test_cached_decoding_of_a_grown_model_equals_the_whole_pass(growth: GrowthConfig) -> None:
    model = tiny_model().double()
    grow(model, "code", growth)
    wake(model, 1)
    ids = tokens(batch=2, length=30)
    whole = model(ids).logits
    cache = model.new_cache(2, 30)
    pieces = [
        model(ids[:, :11], cache=cache).logits,
        *(model(ids[:, at : at + 1], cache=cache).logits for at in range(11, 30)),
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("growth", MODES.values(), ids=MODES)
def test_documents_packed_together_do_not_see_each_other(growth: GrowthConfig) -> None:
    model = tiny_model().double()
    grow(model, "code", growth)
    wake(model, 1)
    ids = tokens(batch=2, length=50)
    starts = torch.zeros_like(ids)
    starts[:, 20:] = 20
    packed = model(ids, document_starts=starts)
    alone = model(ids[:, 20:])
    torch.testing.assert_close(packed.logits[:, 20:], alone.logits, rtol=1e-9, atol=1e-9)
    if packed.gates is not None and alone.gates is not None:
        torch.testing.assert_close(packed.gates[:, 20:], alone.gates, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(side: str) -> None:
    model = tiny_model().double()
    grow(model, "code")
    wake(model, 1)
    ids = tokens(batch=2, length=30)
    padding = torch.full((2, 7), TINY.pad_id)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    mask = (padded != TINY.pad_id).long()
    real = (
        model(padded, attention_mask=mask).logits[:, 7:]
        if side == "left"
        else model(padded, attention_mask=mask).logits[:, :30]
    )
    torch.testing.assert_close(real, model(ids).logits, rtol=1e-9, atol=1e-9)
