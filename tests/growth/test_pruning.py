"""Pruning: a smaller model that is the masked full one, and gets back every bit of what left."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mfext.commands.models import load_model, save_model
from mfext.config import GrowthConfig, ModelConfig, RouterKind
from mfext.config_pruning import PruningConfig
from mfext.conversion import from_mapping, to_mapping
from mfext.errors import InputError
from mfext.growth.apply import apply_plan, measure_usage, set_trainable
from mfext.growth.banks import (
    BankKey,
    bank_keys,
    bank_parameters,
    expert_parameters,
    fewest_experts,
    num_experts,
    with_experts,
)
from mfext.growth.masking import MOST_DIFFERENCE, ablation_scores, masked, prove_pruning
from mfext.growth.plan import BankCut, Plan, PruneExperts, count_parameters, plan_detach, plan_expansion, plan_growth
from mfext.growth.probes import Windows
from mfext.growth.pruning import (
    RemovedExperts,
    apply_pruning,
    plan_pruning,
    pruning_cuts,
    random_scores,
    restore_experts,
)
from mfext.growth.review import mean_loss
from mfext.hub.molm import published_config, published_tensors
from mfext.metrics.usage import UsageCounter, scores
from mfext.model.losses import language_loss, routing_loss
from mfext.model.moduleformer import ModuleFormer
from mfext.report.planning import plan_report
from mfext.report.report import Table
from mfext.store import load_tensors, read_json_object, write_file_atomically
from mfext.store_tensors import save_tensors
from tests.growth.tiny_growth import MODES, TINY, bits, force_gate, grow, tokens, wake

HALF = PruningConfig(criterion="random", keep=0.5)
EVEN = replace(HALF, budget="per_layer")
GROWTH, COMPETE, PRESERVE, SIDE = (
    replace(MODES[mode], attention_experts=3, feedforward_experts=4, attention_experts_per_token=1)
    for mode in ("gated", "compete", "preserve", "side")
)
ROUTERS: tuple[RouterKind, ...] = ("mlp", "linear", "gmm")
LINEAGES: dict[str, tuple[GrowthConfig, ...]] = {
    "base": (),
    "gated": (GROWTH,),
    "side": (SIDE,),
    "compete": (COMPETE,),
    "preserve": (PRESERVE,),
    "preserve-preserve-side-gated": (PRESERVE, replace(PRESERVE, attention_experts=0), SIDE, GROWTH),
    "compete-gated-compete": (COMPETE, GROWTH, COMPETE),
}


def lively(router: RouterKind = "mlp", lineage: Sequence[GrowthConfig] = (), seed: int = 0) -> ModuleFormer:
    """A model whose routers decide differently from token to token, its gates open."""
    torch.manual_seed(seed)
    model = ModuleFormer(replace(TINY, router=router, attention_experts=4, feedforward_experts=6)).eval()
    for number, growth in enumerate(lineage, 1):
        grow(model, f"domain{number}", replace(growth, new_router_bias=0.0))
        wake(model, number)
        if growth.mode == "gated":
            force_gate(model, number, 1e9)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def random_plan(model: ModuleFormer, settings: PruningConfig = HALF, seed: int = 3) -> Plan:
    return plan_pruning(model.config, random_scores(model.config, seed), settings)


def kept(plan: Plan) -> dict[BankKey, tuple[int, ...]]:
    """The experts that stay, of every bank."""
    cuts = {cut.key: cut.kept for cut in pruning_cuts(plan)}
    return {key: cuts.get(key, tuple(range(num_experts(plan.before, key)))) for key in bank_keys(plan.before)}


def copy_of(model: ModuleFormer) -> ModuleFormer:
    twin = ModuleFormer(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def windows(seed: int = 9) -> Windows:
    ids = tokens(seed, batch=4, length=30)
    return Windows(ids, torch.zeros_like(ids))


@pytest.mark.parametrize("lineage", LINEAGES)
@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_a_pruned_model_is_the_masked_full_one_and_restores_to_the_same_bits(router: RouterKind, lineage: str) -> None:
    full = lively(router, LINEAGES[lineage])
    model, before, logits = copy_of(full), bits(full), full(tokens()).logits
    for settings in (HALF, EVEN):
        plan = random_plan(model, settings)
        removed = apply_pruning(model, plan)
        experts = sum(len(cut.removed) * expert_parameters(plan.before, cut.key) for cut in pruning_cuts(plan))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters == count_parameters(model.config).total == count_parameters(full.config).total - experts
        assert experts > 0 and {name for name, _ in model.named_parameters()} == before.keys()
        assert prove_pruning(full, model, plan, tokens()) <= MOST_DIFFERENCE * max(1.0, float(logits.abs().max()))
        assert (model(tokens()).logits - logits).abs().max() > 100 * MOST_DIFFERENCE, "those that left did something"
        assert torch.equal(full(tokens()).logits, logits), "no mask is left behind"
        restore_experts(model, removed)
        assert bits(model) == before and model.config == full.config
        assert torch.equal(model(tokens()).logits, logits)


def test_a_mask_that_is_not_the_cut_would_be_noticed() -> None:
    full = lively()
    model, plan = copy_of(full), random_plan(full)
    apply_pruning(model, plan)
    with torch.no_grad():
        model.blocks[0].feedforward.experts.down.mul_(1.01)
    assert prove_pruning(full, model, plan, tokens()) > MOST_DIFFERENCE


def test_documents_of_a_packed_batch_are_proved_apart() -> None:
    full = lively()
    model, plan = copy_of(full), random_plan(full)
    apply_pruning(model, plan)
    starts = torch.where(torch.arange(40) < 17, 0, 17).expand(3, 40)
    assert prove_pruning(full, model, plan, tokens(), starts) <= MOST_DIFFERENCE


def test_pruning_nothing_changes_no_bit() -> None:
    model = lively(lineage=(SIDE, PRESERVE))
    before, config, logits = bits(model), model.config, model(tokens()).logits
    for settings in (replace(HALF, keep=1.0), replace(EVEN, keep=1.0)):
        plan = random_plan(model, settings)
        assert plan.operations == (PruneExperts(()),) and plan.after == plan.before
        removed = apply_pruning(model, plan)
        assert bits(model) == before and model.config == config
        assert torch.equal(model(tokens()).logits, logits)
        restore_experts(model, removed)
        assert bits(model) == before


@pytest.mark.parametrize("budget", ["global", "per_layer"])
@pytest.mark.parametrize("seed", range(5))
def test_smaller_budgets_keep_part_of_what_larger_ones_keep_and_never_too_few(budget: str, seed: int) -> None:
    config = lively(lineage=(COMPETE, SIDE, GROWTH)).config
    values = random_scores(config, seed)
    least = {key: fewest_experts(config, key) for key in bank_keys(config)}
    total = sum(num_experts(config, key) for key in least)
    larger = None
    for keep in (1.0, 0.93, 0.8, 0.7, 0.61):
        settings = replace(HALF, keep=keep, budget=budget)
        plan = plan_pruning(config, values, settings)
        reordered = {key: values[key] for key in reversed(values)}
        assert plan == plan_pruning(config, reordered, settings)
        staying = kept(plan)
        assert all(len(staying[key]) >= least[key] for key in staying)
        for key, experts in staying.items():
            assert larger is None or set(experts) <= set(larger[key])
            worst = min(values[key][expert] for expert in experts)
            assert all(values[key][expert] <= worst for expert in set(range(num_experts(config, key))) - set(experts))
            if budget == "per_layer":
                assert len(experts) == max(least[key], math.ceil(keep * num_experts(config, key)))
        if budget == "global":
            assert sum(map(len, staying.values())) == math.ceil(keep * total)
        larger = staying


def test_equal_scores_are_decided_by_number() -> None:
    config = replace(TINY, feedforward_experts=5)
    equal = {key: [1.0] * num_experts(config, key) for key in bank_keys(config)}
    staying = kept(plan_pruning(config, equal, replace(EVEN, keep=0.6, kinds="feedforward")))
    assert staying == {(layer, kind, 0): (0, 1, 2) for layer in range(2) for kind in ("attention", "feedforward")}


def test_a_third_of_three_experts_is_one_whatever_rounding_does() -> None:
    config = replace(TINY, attention_experts_per_token=1, attention_experts=3)
    plan = plan_pruning(config, random_scores(config, 0), replace(EVEN, keep=1 / 3, kinds="attention"))
    assert plan.after.attention_experts == 1


def test_banks_measured_on_another_scale_share_a_global_budget() -> None:
    config = replace(TINY, attention_experts=4, attention_experts_per_token=1)
    values = {key: [1.0, 2.0, 3.0, 4.0] for key in bank_keys(config)}
    values[1, "attention", 0] = [1000.0, 2000.0, 3000.0, 4000.0]
    even = plan_pruning(config, values, replace(HALF, criterion="usage", kinds="attention"))
    assert even.after.attention_experts == 2
    raw = plan_pruning(config, values, replace(HALF, criterion="ablation", kinds="attention"))
    assert raw.after.attention_experts == (1, 3), "the losses of an ablation mean the same everywhere"


def test_negative_scores_rank_below_all_others() -> None:
    config = replace(TINY, attention_experts=4, attention_experts_per_token=1)
    values = {key: [-4.0, 1.0, -3.0, -2.0] for key in bank_keys(config)}
    plan = plan_pruning(config, values, replace(HALF, criterion="ablation", kinds="attention"))
    assert kept(plan)[0, "attention", 0] == (1, 3)


@pytest.mark.parametrize("budget", ["global", "per_layer"])
def test_a_target_is_never_passed_and_used_as_far_as_whole_experts_go(budget: str) -> None:
    config = lively(lineage=(SIDE,)).config
    weights = {key: expert_parameters(config, key) for key in bank_keys(config)}
    least = sum(fewest_experts(config, key) * weight for key, weight in weights.items())
    most = sum(num_experts(config, key) * weight for key, weight in weights.items())
    for target in (least, least + 5000, most - 1, most):
        settings = replace(HALF, unit="parameters", target=float(target), budget=budget)
        plan = plan_pruning(config, random_scores(config, 1), settings)
        staying = sum(len(experts) * weights[key] for key, experts in kept(plan).items())
        assert staying <= target
        assert target < most or not pruning_cuts(plan)
        if budget == "global":
            assert staying > target - max(weights.values()) or target == most
    megabytes = replace(HALF, unit="megabytes", target=most * 4 / 1e6)
    assert not pruning_cuts(plan_pruning(config, random_scores(config, 1), megabytes))
    with pytest.raises(InputError, match=f"least possible here is {least} parameters"):
        plan_pruning(config, random_scores(config, 1), replace(settings, target=float(least - 1)))


def test_scores_of_a_shared_softmax_are_told_apart() -> None:
    model = lively(lineage=(COMPETE, GROWTH, COMPETE))
    counter = UsageCounter({"attention": 4, "feedforward": 6})
    counter.update(model(tokens()).routings, torch.ones(3, 40))
    values = scores(counter.usage(), "usage")
    assert len(values[0, "feedforward", 0]) == 6 + 4 + 4
    plan = plan_pruning(model.config, values, replace(EVEN, criterion="usage"))
    joint = values[0, "feedforward", 0]
    for generation, first, size in ((0, 0, 6), (1, 6, 4), (3, 10, 4)):
        experts = kept(plan)[0, "feedforward", generation]
        worst = min(joint[first + expert] for expert in experts)
        assert len(experts) == max(2, math.ceil(size / 2)) and worst > 0
        assert all(joint[first + expert] <= worst for expert in range(size) if expert not in experts)


def test_a_dry_run_says_how_many_experts_leave() -> None:
    plan = random_plan(lively(), EVEN)
    table = plan_report("prune", plan.to_json() | {"plan": plan.to_json()}).sections[0]
    assert isinstance(table, Table) and table.rows == (("PruneExperts", "10 of 20 experts leave 4 banks"),)


def test_only_the_banks_asked_for_lose_experts() -> None:
    config = lively(lineage=(SIDE, COMPETE)).config
    for settings, wanted in (
        (replace(HALF, generations="base"), {0}),
        (replace(HALF, generations="domain1"), {1}),
        (replace(HALF, generations=("base", "domain2"), kinds="feedforward"), {0, 2}),
    ):
        plan = plan_pruning(config, random_scores(config, 2), settings)
        cut = {each.key for each in pruning_cuts(plan)}
        assert cut and {key[2] for key in cut} <= wanted
        assert settings.kinds == "both" or {key[1] for key in cut} == {"feedforward"}


def test_what_cannot_be_planned_is_refused_with_what_can() -> None:
    config = lively(lineage=(SIDE,)).config
    values = random_scores(config, 0)
    with pytest.raises(InputError, match=r"no generation 'cod'.*known: all, base, domain1"):
        plan_pruning(config, values, replace(HALF, generations="cod"))
    with pytest.raises(InputError, match=r"keep=0.1.*least possible here is 0\.4118"):
        plan_pruning(config, values, replace(HALF, keep=0.1))
    with pytest.raises(InputError, match=r"keep=0.1.*least possible here is 0\.3334"):
        plan_pruning(config, values, replace(EVEN, keep=0.1, generations="base"))
    del values[1, "attention", 1]
    with pytest.raises(InputError, match=r"no scores.*layer 1 attention of domain1.*generations"):
        plan_pruning(config, values, HALF)
    plan_pruning(config, values, replace(HALF, generations="base"))
    for wrong, what in (([1.0, 2.0], "2 scores.*has 4"), ([1.0, 2.0, math.nan, 1.0], "not finite")):
        with pytest.raises(InputError, match=what):
            plan_pruning(config, values | {(0, "attention", 0): wrong}, replace(HALF, generations="base"))
    dense = ModelConfig(
        architecture="dense", attention_experts=1, attention_experts_per_token=1, feedforward_experts=1,
        feedforward_experts_per_token=1, routing_loss_weight=0.0,
    )  # fmt: skip
    with pytest.raises(InputError, match="no experts to remove"):
        plan_pruning(dense, {}, HALF)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"keep": 0.0}, "keep=0.0: must be a share above 0"),
        ({"keep": 1.2}, "keep=1.2"),
        ({"unit": "megabytes"}, "target=None: must be how many megabytes"),
        ({"target": 3.0}, "target=3.0: must be null where unit is share"),
        ({"max_loss_increase": -0.1}, "max_loss_increase=-0.1"),
        ({"generations": []}, "generations"),
        ({"criterion": "magic"}, "criterion"),
    ],
)
def test_a_wrong_setting_names_what_is_allowed(wrong: dict[str, object], what: str) -> None:
    with pytest.raises(InputError, match=what):
        from_mapping(PruningConfig, wrong)


def test_experts_return_to_the_model_they_left_once() -> None:
    model, other = lively(), lively()
    plan = random_plan(model)
    removed = apply_pruning(model, plan)
    for where in (other, lively(lineage=(SIDE,))):
        with pytest.raises(InputError, match="do not fit the model"):
            restore_experts(where, removed)
        with pytest.raises(InputError, match="plan again"):
            apply_pruning(model, plan)
    with pytest.raises(InputError, match=r"do not fit the model: blocks\.0"):
        restore_experts(model, replace(removed, tensors={}))
    restore_experts(model, removed)
    with pytest.raises(InputError, match="back already"):
        restore_experts(model, removed)
    with pytest.raises(InputError, match="not the model this plan leaves"):
        prove_pruning(other, model, plan, tokens())


def test_a_pruned_model_and_what_left_it_survive_their_folders(tmp_path: Path) -> None:
    model = lively("gmm", (PRESERVE, SIDE))
    before = bits(model)
    removed = apply_pruning(model, random_plan(model))
    assert isinstance(model.config.attention_experts, tuple) or isinstance(model.config.feedforward_experts, tuple)
    save_model(model, tmp_path / "pruned")
    tensors, facts = removed.to_parts()
    save_tensors(tmp_path / "removed.safetensors", tensors)
    write_file_atomically(tmp_path / "removed.json", json.dumps(facts).encode())
    loaded = load_model(tmp_path / "pruned")
    assert isinstance(loaded, ModuleFormer)
    assert loaded.config == model.config and bits(loaded) == bits(model)
    again = RemovedExperts.from_parts(
        load_tensors(tmp_path / "removed.safetensors"), read_json_object(tmp_path / "removed.json")
    )
    restore_experts(loaded, again)
    assert bits(loaded) == before
    for wrong in ({"of": 99}, {"kept": []}, {"layer": 7}, {"kept": [1, 0]}):
        with pytest.raises(InputError, match="of no bank"):
            RemovedExperts.from_parts(tensors, {**facts, "cuts": [asdict(removed.cuts[0]) | wrong]})


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("lineage", ["base", "side", "preserve-preserve-side-gated"])
@torch.no_grad()
def test_decoding_a_pruned_model_gives_the_logits_of_the_whole_pass(
    lineage: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("mfext.model.compiled_step.available", lambda: False)
    model, ids = lively(lineage=LINEAGES[lineage]), tokens(batch=1, length=20)
    apply_pruning(model, random_plan(model))
    cache = model.new_cache(1, 20)
    pieces = [model(piece, cache=cache).logits for piece in ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_decoding_under_a_mask_sees_the_mask() -> None:
    model, ids = lively(), tokens(batch=1, length=12)
    with masked(model, random_plan(model)):
        cache = model.new_cache(1, 12)
        pieces = [model(piece, cache=cache).logits for piece in ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=2e-5, atol=2e-5)
    assert (torch.cat(pieces, 1) - model(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("second", [GROWTH, SIDE, COMPETE], ids=["gated", "side", "compete"])
def test_growing_pruning_growing_and_detaching_leaves_the_pruned_model(second: GrowthConfig) -> None:
    model = lively(lineage=(COMPETE,))
    whole, config = bits(model), model.config
    removed = apply_pruning(model, random_plan(model))
    pruned, pruned_config, logits = bits(model), model.config, model(tokens()).logits
    usage = measure_usage(model, tokens())
    apply_plan(model, plan_growth(model.config, second, "new"), usage)
    busiest = int(usage[model.blocks[0].attention.site][: model.config.experts("attention", 0)].argmax())
    source, copied = model.blocks[0].attention.experts.query, model.generation(2).layers[0].attention.query
    assert torch.equal(copied[0], source[busiest]), "new experts start from the busiest of those left"
    wake(model, 2)
    assert count_parameters(model.config).total == sum(parameter.numel() for parameter in model.parameters())
    restore_experts(model, removed)
    assert model.config.generations[0] == config.generations[0] and len(model.generations) == 2
    assert model(tokens()).logits.isfinite().all()
    after = with_experts(model.config, {cut.key: len(cut.kept) for cut in removed.cuts})
    apply_pruning(model, Plan(model.config, (PruneExperts(removed.cuts),), after))
    apply_plan(model, plan_detach(model.config))
    assert bits(model) == pruned and model.config == pruned_config
    assert torch.equal(model(tokens()).logits, logits)
    restore_experts(model, removed)
    assert bits(model) == whole and model.config == config


@torch.no_grad()
def test_the_loss_without_an_expert_is_that_of_the_model_it_left() -> None:
    model, texts = lively(lineage=(SIDE,)), windows()
    seen: list[tuple[int, int]] = []
    found = ablation_scores(model, texts, on_expert=lambda done, total: seen.append((done, total)))
    assert {key: len(values) for key, values in found.items()} == {
        key: num_experts(model.config, key) for key in bank_keys(model.config)
    }
    total = sum(map(len, found.values()))
    assert seen == [(done, total) for done in range(1, total + 1)]
    for key in ((0, "attention", 0), (1, "feedforward", 1)):
        for expert, score in enumerate(found[key]):
            others = tuple(each for each in range(len(found[key])) if each != expert)
            cut = BankCut(*key, kept=others, of=len(found[key]))
            left = copy_of(model)
            apply_pruning(
                left, Plan(model.config, (PruneExperts((cut,)),), with_experts(model.config, {key: len(others)}))
            )
            assert score == pytest.approx(mean_loss(left, texts) - mean_loss(model, texts), abs=1e-5)
    assert list(ablation_scores(model, texts, [(1, "attention", 0)])) == [(1, "attention", 0)]


def test_an_only_expert_has_a_score_that_is_a_number() -> None:
    torch.manual_seed(0)
    one = {"attention_experts": 1, "attention_experts_per_token": 1}
    model = ModuleFormer(replace(TINY, **one)).eval()
    grow(model, "code", replace(PRESERVE, **one))
    wake(model, 1)
    found = ablation_scores(model, windows(), [(0, "attention", 0), (0, "attention", 1)])
    assert found[0, "attention", 0] == [0.0] and math.isfinite(found[0, "attention", 1][0])


def test_random_scores_follow_their_seed_alone() -> None:
    config = lively(lineage=(GROWTH,)).config
    assert random_scores(config, 4) == random_scores(config, 4) != random_scores(config, 5)


def test_a_pruned_model_trains_and_only_where_it_did_before() -> None:
    model = lively(lineage=(COMPETE,))
    chosen = {name for name, _ in model.named_parameters() if "feedforward" in name}
    set_trainable(model, chosen)
    apply_pruning(model, random_plan(model))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == chosen
    output = model(tokens())
    loss = language_loss(output.logits[:, :-1], tokens()[:, 1:]) + routing_loss(output.routings, None, "mi")
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in chosen)


def test_a_bank_lists_every_tensor_that_has_a_row_an_expert() -> None:
    for router in ROUTERS:
        model = lively(router, (SIDE, PRESERVE))
        listed = [name for key in bank_keys(model.config) for name in bank_parameters(model, key)]
        assert len(listed) == len(set(listed))
        per_expert = ("query", "output", "up", "down", "centroids")
        wanted = {
            name
            for name, parameter in model.named_parameters()
            if name.endswith((*per_expert, "output.weight", "_router.weight", "_router.bias"))
        }
        assert set(listed) == wanted - {"lm_head.weight"}


def test_the_published_layout_takes_even_banks_only() -> None:
    model = ModuleFormer(replace(TINY, attention_experts=4, feedforward_experts=6))
    apply_pruning(model, random_plan(model, EVEN))
    assert published_config(model.config)["n_mlp_experts"] == 3
    assert published_tensors(model.state_dict(), model.config)
    uneven = replace(TINY, feedforward_experts=(4, 3))
    for publish in (published_config, lambda config: published_tensors({}, config)):
        with pytest.raises(InputError, match=r"one count of experts for all layers.*feedforward_experts=\[4, 3\]"):
            publish(uneven)


def test_layers_inserted_into_a_pruned_model_are_copies_of_their_size() -> None:
    model = ModuleFormer(replace(TINY, feedforward_experts=(4, 3))).eval()
    logits = model(tokens()).logits
    apply_plan(model, plan_expansion(model.config, 2))
    assert model.config.feedforward_experts == (4, 4, 3, 3) and model.config.attention_experts == 3
    assert torch.equal(model(tokens()).logits, logits)


def test_equal_counts_are_one_number_and_a_config_says_what_is_wrong_with_others() -> None:
    same = replace(TINY, feedforward_experts=(4, 4))
    assert same == TINY and json.dumps(to_mapping(same)) == json.dumps(to_mapping(TINY))
    uneven = replace(TINY, feedforward_experts=(4, 3))
    assert from_mapping(ModelConfig, json.loads(json.dumps(to_mapping(uneven)))) == uneven
    with pytest.raises(InputError, match="whole number or list"):
        from_mapping(ModelConfig, {"attention_experts": "many"})
    for counts, what in (((4, 3, 2), r"one a layer \(2\)"), ((4, 1), r"between 1 and feedforward_experts \(1\)")):
        with pytest.raises(ValueError, match=what):
            replace(TINY, feedforward_experts=counts)
    grown = plan_growth(TINY, GROWTH, "code").after.generations[0]
    with pytest.raises(ValueError, match=r"between 1 and the choices of the smallest bank \(1\)"):
        replace(grown, feedforward_experts=(3, 1))
