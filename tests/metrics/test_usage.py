"""Expert usage against counts by hand, batch by batch, and with the model's own routing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mfext.config import GrowthMode
from mfext.errors import InputError
from mfext.metrics.overlap import overlap
from mfext.metrics.usage import RoutingLike, Usage, UsageCounter, scores
from mfext.model.observing import observing
from mfext.model.router import Routing, Site, route
from tests.growth.tiny_growth import MODES, grow, tiny_model, tokens, wake


@dataclass(frozen=True)
class Place:
    layer: int
    kind: str


@dataclass(frozen=True)
class Decision:
    site: Place
    generation: int
    num_experts: int
    experts_MK: Tensor
    gates_MK: Tensor
    tokens_M: Tensor | None = None
    output_norms_MK: Tensor | None = None


PLACE = Place(0, "feedforward")


def decide(
    experts: list[list[int]], num_experts: int, generation: int = 0, tokens: list[int] | None = None
) -> Decision:
    experts_MK = torch.tensor(experts).view(len(experts), len(experts[0]))
    gates_MK = torch.full(experts_MK.shape, 0.25)
    return Decision(
        PLACE, generation, num_experts, experts_MK, gates_MK, None if tokens is None else torch.tensor(tokens)
    )


def count(*routings: RoutingLike, valid: list[int], base: Mapping[str, int | Sequence[int]] | None = None) -> Usage:
    counter = UsageCounter(base)
    counter.update(routings, torch.tensor(valid))
    return counter.usage()


def test_shares_gate_mass_entropy_and_dead_experts_are_those_counted_by_hand() -> None:
    usage = count(decide([[0, 1], [0, 1], [0, 2], [3, 3]], 4), valid=[1, 1, 1, 0])
    (bank,) = usage.banks
    assert usage.tokens == bank.tokens == 3
    assert bank.share == pytest.approx((3 / 6, 2 / 6, 1 / 6, 0.0))
    assert bank.gate_mass == pytest.approx((0.25, 0.5 / 3, 0.25 / 3, 0.0))
    assert bank.entropy_nats == pytest.approx(-sum(p * math.log(p) for p in (1 / 2, 1 / 3, 1 / 6)))
    assert bank.dead_experts == 1
    assert bank.share_new == usage.share_new == 0.0


def test_an_expert_is_dead_below_a_tenth_of_an_even_share() -> None:
    choices = [[0]] * 96 + [[1]] * 4 + [[2]] * 5
    (bank,) = count(decide(choices, 3), valid=[1] * 105).banks
    assert [share < 0.1 / 3 for share in bank.share] == [False, False, False]
    (bank,) = count(decide([*choices, *[[0]] * 30], 3), valid=[1] * 135).banks
    assert bank.dead_experts == 1


def test_a_gated_generation_counts_only_the_tokens_dispatched_to_it() -> None:
    base = decide([[0], [1], [0], [1]], 2)
    usage = count(base, decide([[0], [1]], 2, generation=1, tokens=[1, 3]), valid=[1, 1, 1, 0])
    old, new = usage.banks
    assert (new.tokens, new.share, new.share_new) == (1, (1.0, 0.0), pytest.approx(1 / 3))
    assert (old.tokens, old.share_new) == (3, 0.0)
    assert usage.share_new_by_site == {(0, "feedforward"): pytest.approx(1 / 3)}


def test_a_token_that_reaches_two_generations_counts_once_at_its_site() -> None:
    usage = count(
        decide([[0], [0]], 2),
        decide([[0], [1]], 2, generation=1, tokens=[0, 1]),
        decide([[0]], 2, generation=2, tokens=[1]),
        valid=[1, 1],
    )
    assert usage.share_new == 1.0


def test_competing_experts_are_new_from_the_bases_number_on() -> None:
    routing = decide([[0, 4], [1, 2], [5, 4], [0, 1]], 6)
    assert count(routing, valid=[1] * 4, base={"feedforward": 4}).share_new == 0.5
    assert count(routing, valid=[1] * 4).share_new == 0.0


def test_the_bases_number_of_experts_may_differ_from_layer_to_layer() -> None:
    low = decide([[0, 4], [1, 2], [5, 4], [0, 1]], 6)
    high = replace(low, site=Place(1, "feedforward"))
    usage = count(low, high, valid=[1] * 4, base={"feedforward": (4, 5)})
    assert usage.share_new_by_site == {(0, "feedforward"): 0.5, (1, "feedforward"): 0.25}


def test_a_closed_generation_and_an_empty_text_give_zeros_and_no_nan() -> None:
    nobody = torch.zeros(0, dtype=torch.long)
    closed = Decision(PLACE, 1, 2, nobody.view(0, 1), torch.zeros(0, 1), nobody)
    usage = count(closed, valid=[1, 1])
    assert (usage.banks[0].tokens, usage.banks[0].share, usage.share_new) == (0, (0.0, 0.0), 0.0)
    assert UsageCounter().usage().share_new is None
    assert count(decide([[0]], 2), valid=[0]).banks[0].share_new == 0.0


def test_batches_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(60, 5, generator=generator)
    valid_N = torch.rand(60, generator=generator) > 0.3
    whole, parts = UsageCounter({"attention": 3}), UsageCounter({"attention": 3})
    whole.update([route(logits_NE, 2, Site(1, "attention"))], valid_N)
    with torch.inference_mode():
        parts.update([route(logits_NE[:17], 2, Site(1, "attention"))], valid_N[:17])
    parts.update([route(logits_NE[17:], 2, Site(1, "attention"))], valid_N[17:].view(-1, 1))
    a, b = whole.usage().banks[0], parts.usage().banks[0]
    assert a.share == b.share and a.tokens == b.tokens == int(valid_N.sum())
    assert a.gate_mass == pytest.approx(b.gate_mass, rel=1e-12)
    assert 0 < a.share_new == b.share_new < 1


def test_usage_is_plain_json() -> None:
    data = json.loads(json.dumps(count(decide([[0], [1]], 2), valid=[1, 1]).to_json()))
    assert data["sites"] == [{"layer": 0, "kind": "feedforward", "share_new": 0.0}]
    assert data["banks"][0]["share"] == [0.5, 0.5]


def test_null_choices_reach_no_expert_and_are_counted_apart() -> None:
    base = decide([[0], [1], [0], [1]], 2)
    side = decide([[2, 0], [2, 1], [0, 1], [1, 0]], 2, generation=1)
    _, bank = count(base, side, valid=[1, 1, 1, 0]).banks
    assert (bank.tokens, bank.share, bank.share_null) == (3, (0.5, 0.5), pytest.approx(2 / 6))
    usage = count(base, decide([[2], [1], [2], [2]], 2, generation=1), valid=[1, 1, 1, 0])
    old, bank = usage.banks
    assert (bank.tokens, bank.share, bank.share_null) == (1, (0.0, 1.0), pytest.approx(2 / 3))
    assert bank.share_new == pytest.approx(1 / 3) == usage.share_new_by_site[0, "feedforward"]
    assert old.share_null == 0.0
    nowhere = count(base, decide([[2], [2], [2], [2]], 2, generation=1), valid=[1, 1, 1, 0]).banks[1]
    assert (nowhere.tokens, nowhere.share, nowhere.share_null, nowhere.share_new) == (0, (0.0, 0.0), 1.0, 0.0)


def test_an_expert_is_hot_above_twice_its_even_share() -> None:
    (bank,) = count(decide([[0]] * 2 + [[1]] + [[2]], 4), valid=[1] * 4).banks
    assert bank.share[0] == 2 / 4 and bank.hot_experts == 0
    (bank,) = count(decide([[0]] * 3 + [[1]] + [[2]], 4), valid=[1] * 5).banks
    assert bank.hot_experts == 1 and bank.dead_experts == 1


def test_contribution_is_gate_times_norm_for_every_token_routed_here_or_nothing_without_norms() -> None:
    decision = decide([[0, 1], [0, 2], [1, 2], [2, 1]], 3)
    norms_MK = torch.tensor([[2.0, 4.0], [6.0, 8.0], [1.0, 3.0], [100.0, 100.0]])
    (bank,) = count(replace(decision, output_norms_MK=norms_MK), valid=[1, 1, 1, 0]).banks
    assert bank.contribution == pytest.approx((0.25 * 8 / 3, 0.25 * 5 / 3, 0.25 * 11 / 3))
    usage = count(decision, valid=[1, 1, 1, 0])
    assert usage.banks[0].contribution is None
    with pytest.raises(ValueError, match=r"contribution.*observing"):
        scores(usage, "contribution")
    assert scores(usage, "usage") == {(0, "feedforward", 0): usage.banks[0].share}


def naive(routings: list[Routing], key: tuple[int, str, int], valid: list[bool]) -> dict[str, list[float]]:
    """Shares, gate mass and contribution of one bank, token by token and choice by choice."""
    chosen: dict[int, float] = {}
    mass: dict[int, float] = {}
    contribution: dict[int, float] = {}
    tokens_here = 0
    for routing in (each for each in routings if (each.site.layer, each.site.kind, each.generation) == key):
        assert routing.output_norms_MK is not None
        where = range(len(valid)) if routing.tokens_M is None else routing.tokens_M.tolist()
        for row, token in enumerate(where):
            experts = [int(expert) for expert in routing.experts_MK[row]]
            if not valid[token] or all(expert == routing.num_experts for expert in experts):
                continue
            tokens_here += 1
            for slot, expert in enumerate(experts):
                gate, norm = float(routing.gates_MK[row, slot]), float(routing.output_norms_MK[row, slot])
                chosen[expert] = chosen.get(expert, 0.0) + 1
                mass[expert] = mass.get(expert, 0.0) + gate
                contribution[expert] = contribution.get(expert, 0.0) + gate * norm
    num_experts = next(
        each.num_experts for each in routings if (each.site.layer, each.site.kind, each.generation) == key
    )
    choices = sum(chosen.get(expert, 0.0) for expert in range(num_experts))
    return {
        "usage": [chosen.get(expert, 0.0) / choices for expert in range(num_experts)],
        "gate_mass": [mass.get(expert, 0.0) / tokens_here for expert in range(num_experts)],
        "contribution": [contribution.get(expert, 0.0) / tokens_here for expert in range(num_experts)],
    }


@pytest.mark.parametrize("mode", [None, "gated", "side", "compete", "preserve"])
def test_scores_of_a_model_are_those_of_a_loop_over_tokens_and_choices(mode: GrowthMode | None) -> None:
    model = tiny_model()
    if mode is not None:
        grow(model, "code", MODES[mode])
        wake(model, 1)
    ids = tokens(batch=2, length=20)
    valid = [token % 3 > 0 for token in range(ids.numel())]
    with torch.inference_mode(), observing(model):
        routings = model(ids).routings
    usage = count(*routings, valid=[int(each) for each in valid])
    assert len(usage.banks) == (8 if mode in ("gated", "side") else 4)
    for criterion in ("usage", "gate_mass", "contribution"):
        for key, found in scores(usage, criterion).items():
            assert found == pytest.approx(naive(list(routings), key, valid)[criterion], rel=1e-6)


def test_usage_comes_back_from_json_as_it_was_and_damage_is_one_clear_error() -> None:
    decision = replace(decide([[0, 4], [1, 2], [5, 4]], 6), output_norms_MK=torch.rand(3, 2))
    usage = count(decision, decide([[0], [1]], 2, 1, [0, 2]), valid=[1] * 3, base={"feedforward": 4})
    plain = json.loads(json.dumps(usage.to_json()))
    assert Usage.from_json(plain) == usage
    with pytest.raises(InputError, match=r"kept\.banks"):
        Usage.from_json({**plain, "banks": [{**plain["banks"][0], "share": "much"}]}, "kept")


def test_overlap_is_whole_for_equal_usage_and_none_at_all_for_disjoint_experts() -> None:
    left, right = count(decide([[0], [1]], 4), valid=[1, 1]), count(decide([[2], [3]], 4), valid=[1, 1])
    assert overlap(left, left).cosine == pytest.approx(1.0) and overlap(left, left).divergence_nats == 0.0
    apart = overlap(left, right)
    assert apart.cosine == 0.0 and apart.divergence_nats == pytest.approx(math.log(2))
    half = overlap(left, count(decide([[1], [2]], 4), valid=[1, 1]))
    assert half.cosine == pytest.approx(0.5) and half == overlap(count(decide([[2], [1]], 4), valid=[1, 1]), left)


def test_a_generation_that_one_text_reaches_and_the_other_does_not_parts_them() -> None:
    base = decide([[0], [1]], 2)
    closed, opened = count(base, valid=[1, 1]), count(base, decide([[0], [1]], 2, 1, [0, 1]), valid=[1, 1])
    assert overlap(closed, opened).cosine == pytest.approx(math.sqrt(0.5))
    assert overlap(closed, UsageCounter().usage()).cosine is None
