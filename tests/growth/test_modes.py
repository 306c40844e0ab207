"""What each way of growing promises: identity, untouched bases, exact detach, free null choices, mixed lineages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mfext.config import GrowthConfig
from mfext.config_gate import DomainGateConfig
from mfext.errors import InputError
from mfext.growth.apply import apply_plan, set_trainable
from mfext.growth.growing import grow as grow_and_check
from mfext.growth.plan import count_parameters, plan_detach, plan_growth
from mfext.model.forward_pass import Pass
from mfext.model.generation import OpenTokens
from mfext.model.losses import language_loss, routing_loss
from mfext.model.moduleformer import ModuleFormer
from mfext.model.positions import Positions
from mfext.model.router import Router, RouterRows
from mfext.training.routing_log import routing_numbers
from tests.growth.tiny_growth import (
    COMPETE,
    GROWTH,
    MODES,
    PRESERVE,
    SIDE,
    ascii_windows,
    bits,
    force_gate,
    grow,
    tiny_model,
    tokens,
    train_new,
    wake,
)

every_mode = pytest.mark.parametrize("growth", MODES.values(), ids=MODES)


def routers(model: ModuleFormer, number: int) -> list[nn.Module]:
    """Every router (or rows of one) of a generation."""
    layers = model.generation(number).layers
    return [each for layer in layers for each in (layer.attention_router, layer.feedforward_router)]


def choose_null(model: ModuleFormer, number: int) -> None:
    """Make the null choice every token's first: constant features, and a large weight on its row."""
    with torch.no_grad():
        for router in routers(model, number):
            assert isinstance(router, Router)
            router.hidden.weight.zero_()
            router.hidden.bias.fill_(1.0)
            router.output.weight.zero_()
            router.output.weight[-1] = 100.0


def spoil_experts(model: ModuleFormer, number: int) -> None:
    """Not-a-number in every new expert: whatever computes with one shows it."""
    with torch.no_grad():
        for name, parameter in model.generation(number).named_parameters():
            if name.endswith(("attention.query", "attention.output", "feedforward.up", "feedforward.down")):
                parameter.fill_(float("nan"))


def test_a_side_growth_is_exactly_the_identity_and_says_so() -> None:
    model = tiny_model()
    before = model(tokens()).logits
    new, old = ascii_windows(65, 91, 8, 1), ascii_windows(97, 123, 8, 2)
    growth = grow_and_check(model, plan_growth(model.config, SIDE, "code"), SIDE, new, old, seed=1)
    assert growth.identity_at_growth == 0.0 and growth.gate is None
    output = model(tokens())
    assert any(routing.generation == 1 for routing in output.routings)
    assert torch.equal(output.logits, before)


def test_a_preserving_growth_is_the_identity_as_long_as_no_new_expert_is_chosen() -> None:
    model = tiny_model()
    before = model(tokens()).logits
    grow(model, "code", replace(PRESERVE, new_router_bias=-1e4))
    wake(model, 1)
    with torch.no_grad():
        for rows in routers(model, 1):
            assert isinstance(rows, RouterRows)
            rows.bias.fill_(-1e4)
    assert torch.equal(model(tokens()).logits, before)


def test_what_displaced_old_experts_gave_is_reported_as_the_distance_from_identity() -> None:
    model = tiny_model()
    growth = replace(PRESERVE, new_router_bias=0.0)
    new, old = ascii_windows(65, 91, 8, 1), ascii_windows(97, 123, 8, 2)
    before = model(old.input_ids, document_starts=old.document_starts).logits
    grown = grow_and_check(model, plan_growth(model.config, growth, "code"), growth, new, old, seed=1)
    after = model(old.input_ids, document_starts=old.document_starts)
    assert any((each.experts_MK >= each.num_experts - 2).any() for each in after.routings), "some were displaced"
    assert grown.identity_at_growth == float((after.logits - before).detach().abs().max()) > 0


def test_old_gates_are_bit_equal_in_the_grown_model_where_no_new_expert_is_chosen() -> None:
    model = tiny_model()
    before = model(tokens()).routings[0]
    grow(model, "code", replace(PRESERVE, new_router_bias=0.0))
    wake(model, 1)
    after = model(tokens()).routings[0]
    untouched_M = (after.experts_MK < 3).all(1)
    assert untouched_M.any() and not untouched_M.all()
    assert torch.equal(after.experts_MK[untouched_M], before.experts_MK[untouched_M])
    assert torch.equal(after.gates_MK[untouched_M], before.gates_MK[untouched_M])


@every_mode
def test_gradients_reach_the_new_generation_and_nothing_else(growth: GrowthConfig) -> None:
    model = tiny_model()
    grow(model, "code", growth)
    wake(model, 1)
    if growth.mode == "gated":
        force_gate(model, 1, 1e9)
    for parameter in model.generation(1).parameters():
        parameter.requires_grad_(True)
    output = model(tokens())
    loss = language_loss(output.logits[:, :-1], tokens()[:, 1:]) + routing_loss(output.routings, None, "mi")
    loss.backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert all(name.startswith("generations.0.") for name in learned)
    wanted = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("generations.0.layers.") and ("_router." in name or ".attention." in name)
    }
    assert wanted <= learned, "experts and routers of every layer"


@every_mode
def test_detaching_the_second_of_two_generations_gives_back_the_first(growth: GrowthConfig) -> None:
    model = tiny_model()
    grow(model, "code", growth)
    wake(model, 1)
    if growth.mode == "gated":
        force_gate(model, 1, 1e9)
    first, config, logits = bits(model), model.config, model(tokens()).logits
    grow(model, "math", growth)
    if growth.mode == "gated":
        force_gate(model, 2, 1e9)
    train_new(model, steps=4)
    apply_plan(model, plan_detach(model.config))
    assert bits(model) == first and model.config == config
    assert torch.equal(model(tokens()).logits, logits)


@every_mode
def test_the_order_of_new_experts_means_nothing(growth: GrowthConfig) -> None:
    model = tiny_model().double()
    grow(model, "code", growth)
    wake(model, 1)
    if growth.mode == "gated":
        force_gate(model, 1, 1e9)
    before = model(tokens()).logits
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for layer in model.generation(1).layers:
            rows = [layer.feedforward.up, layer.feedforward.down]
            router = layer.feedforward_router
            rows += [router.weight, router.bias] if isinstance(router, RouterRows) else [router.output.weight[:3]]
            for each in rows:
                each.copy_(each[order].clone())
    torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-10, atol=1e-10)


def test_where_every_choice_is_null_the_base_answers_bit_for_bit_and_no_expert_is_computed() -> None:
    model = tiny_model()
    before = model(tokens()).logits
    grow(model, "code", replace(SIDE, attention_experts_per_token=1, feedforward_experts_per_token=1))
    choose_null(model, 1)
    spoil_experts(model, 1)
    output = model(tokens())
    assert torch.equal(output.logits, before)
    assert all((routing.experts_MK == routing.num_experts).all() for routing in output.routings if routing.generation)
    model.zero_grad()
    set_trainable(model, {name for name, _ in model.named_parameters() if name.startswith("generations.0.")})
    assert not model(tokens()).logits.requires_grad, "nothing of the generation took part"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "feedforward"])
def test_rows_that_chose_no_expert_keep_their_bits_beside_rows_that_did(kind: str) -> None:
    model = tiny_model()
    x_BTD = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(4))
    x_BTD[:, :, 0] = torch.tensor([10.0, -10.0, 10.0])[:, None]
    positions = Positions(0, None)
    before = getattr(model.blocks[0], kind)(x_BTD, Pass(positions, (), (), None, False)).update_BTD
    grow(model, "code", replace(SIDE, attention_experts_per_token=1, feedforward_experts_per_token=1))
    wake(model, 1)
    router = getattr(model.generation(1).layers[0], f"{kind}_router")
    for parameter in router.parameters():
        parameter.zero_()
    router.hidden.weight[0, 0] = 1.0  # feature 0 is 10 in rows 0 and 2, and 0 in row 1
    router.hidden.bias[1] = 1.0
    router.output.weight[-1, 0], router.output.weight[0, 1] = 100.0, 5.0
    side = OpenTokens(1, model.generation(1))
    output = getattr(model.blocks[0], kind)(x_BTD, Pass(positions, (side,), (), None, False))
    null_BT = (output.routings[1].experts_MK[:, 0] == output.routings[1].num_experts).view(3, 12)
    assert null_BT.all(1).tolist() == [True, False, True]
    assert torch.equal(output.update_BTD[[0, 2]], before[[0, 2]])
    assert not torch.equal(output.update_BTD[1], before[1])
    alone = getattr(model.blocks[0], kind)(
        x_BTD[1:2],
        Pass(positions, (OpenTokens(1, model.generation(1)),), (), None, False),
    )
    torch.testing.assert_close(output.update_BTD[1:2], alone.update_BTD)


@torch.no_grad()
def test_one_sequence_decodes_through_a_side_generation_as_the_whole_pass_does() -> None:
    model = tiny_model().double()
    grow(model, "code", SIDE)
    wake(model, 1)
    ids, cache = tokens(batch=1, length=20), model.new_cache(1, 20)
    whole = model(ids)
    counts = {int(each) for routing in whole.routings if routing.generation for each in routing.experts_MK.eq(2).sum(1)}
    assert counts == {0, 1}, "some tokens use two new experts, some one"
    pieces = [model(piece, cache=cache).logits for piece in ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("below", [SIDE, PRESERVE, COMPETE], ids=["side", "preserve", "compete"])
def test_a_closed_gate_gives_back_whatever_lineage_lies_below_it(below: GrowthConfig) -> None:
    model = tiny_model()
    grow(model, "code", below)
    wake(model, 1)
    before = model(tokens()).logits
    grow(model, "math", GROWTH)
    wake(model, 2)
    force_gate(model, 2, -1e9)
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize("below", [GROWTH, PRESERVE, COMPETE], ids=["gated", "preserve", "compete"])
def test_a_side_growth_is_the_identity_on_any_lineage(below: GrowthConfig) -> None:
    model = tiny_model()
    grow(model, "code", below)
    wake(model, 1)
    before = model(tokens()).logits
    grow(model, "math", SIDE)
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize(("first", "second"), [(COMPETE, PRESERVE), (PRESERVE, COMPETE)])
def test_one_softmax_is_not_normalised_in_two_ways(first: GrowthConfig, second: GrowthConfig) -> None:
    model = tiny_model()
    grow(model, "code", first)
    grow(model, "side", SIDE)
    with pytest.raises(InputError, match=f"mode {second.mode} on a model that has a generation of mode {first.mode}"):
        plan_growth(model.config, second, "math")


def test_only_a_gate_may_switch_changes_of_embedding_and_norms() -> None:
    model = tiny_model()
    generation = plan_growth(model.config, replace(SIDE, embedding_rank=8, norms=True), "code").after.generations[0]
    assert (generation.embedding_rank, generation.norms, generation.gate) == (0, False, None)
    with pytest.raises(ValueError, match="only a gate"):
        replace(generation, embedding_rank=8)
    with pytest.raises(ValueError, match="only there"):
        replace(generation, gate=DomainGateConfig())


def test_preserving_growth_costs_no_more_active_experts_and_side_growth_its_own() -> None:
    model = tiny_model()
    before = count_parameters(model.config).active_per_token
    preserve = count_parameters(plan_growth(model.config, PRESERVE, "code").after).active_per_token
    side = count_parameters(plan_growth(model.config, SIDE, "code").after).active_per_token
    rows = 2 * (8 + 1) * (2 + 3)
    assert preserve - before == rows, "new router rows (2 layers, G 8 and a bias, 5 experts) and nothing else"
    experts = 2 * (2 * 2 * 32 * 16 + 2 * 2 * 32 * 20)
    own_routers = 2 * (2 * (32 * 8 + 8) + 8 * (3 + 4))
    assert side - before == experts + own_routers


def test_training_logs_leave_null_choices_out_of_the_experts_share() -> None:
    model = tiny_model()
    grow(model, "code", replace(SIDE, attention_experts_per_token=1, feedforward_experts_per_token=1))
    numbers = routing_numbers(model(tokens()), model.config, tokens().numel())
    assert "gate_open_share" not in numbers and 0 < numbers["new_expert_share"] < 1
    choose_null(model, 1)
    numbers = routing_numbers(model(tokens()), model.config, tokens().numel())
    assert numbers["new_expert_share"] == 0.0
    assert (numbers["dead_experts_attention"], numbers["dead_experts_feedforward"]) == (4.0, 6.0)


def test_training_logs_count_preserving_experts_as_the_new_ones_of_one_softmax() -> None:
    model = tiny_model()
    grow(model, "code", replace(PRESERVE, new_router_bias=1e4))
    assert routing_numbers(model(tokens()), model.config, tokens().numel())["new_expert_share"] == 1.0
