"""Expert usage against counts by hand, batch by batch, and with the model's own routing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mfext.metrics.usage import RoutingLike, Usage, UsageCounter
from mfext.model.router import Site, route


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


PLACE = Place(0, "feedforward")


def decide(
    experts: list[list[int]], num_experts: int, generation: int = 0, tokens: list[int] | None = None
) -> Decision:
    experts_MK = torch.tensor(experts).view(len(experts), len(experts[0]))
    gates_MK = torch.full(experts_MK.shape, 0.25)
    return Decision(
        PLACE, generation, num_experts, experts_MK, gates_MK, None if tokens is None else torch.tensor(tokens)
    )


def count(*routings: RoutingLike, valid: list[int], base: dict[str, int] | None = None) -> Usage:
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
