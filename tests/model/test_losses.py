"""Routing losses: the definitions by hand, and padding that never counts."""

from __future__ import annotations

import math

import pytest
import torch

from mfext.config import ModelConfig
from mfext.model.losses import concentration_loss, language_loss, routing_loss
from mfext.model.moduleformer import ModuleFormer
from mfext.model.router import Router, RouterRows, Site, route

TINY = ModelConfig(
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_attention=8,
    attention_experts=3,
    feedforward_experts=4,
    d_feedforward=12,
    d_router=6,
)
SITE = Site(0, "feedforward")


def test_mutual_information_is_minus_log_e_for_certain_balanced_routing() -> None:
    logits = 60.0 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert routing_loss([route(logits, 1, SITE)], None, "mi").item() == pytest.approx(-math.log(4), abs=1e-6)


def test_mutual_information_is_zero_when_every_token_routes_alike() -> None:
    logits = torch.randn(1, 5, dtype=torch.float64).repeat(7, 1)
    assert routing_loss([route(logits, 2, SITE)], None, "mi").item() == pytest.approx(0, abs=1e-6)


def test_concentration_is_the_entropy_of_the_mean_routing() -> None:
    logits = torch.zeros(6, 4, dtype=torch.float64)
    assert concentration_loss([route(logits, 1, SITE)], None).item() == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("kind", ["mi", "switch"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss(kind: str, side: str) -> None:
    model = ModuleFormer(TINY).double()
    ids = torch.randint(0, 256, (3, 12))
    plain = model(ids)
    padding = torch.full((3, 5), TINY.pad_id)
    padded_ids = torch.cat([padding, ids] if side == "left" else [ids, padding], 1)
    mask = (padded_ids != TINY.pad_id).long()
    padded = model(padded_ids, attention_mask=mask)
    expected = routing_loss(plain.routings, None, kind)
    torch.testing.assert_close(routing_loss(padded.routings, mask.bool(), kind), expected)


def test_language_loss_skips_ignored_targets() -> None:
    logits = torch.randn(1, 3, 5)
    targets = torch.tensor([[1, -100, 4]])
    expected = torch.nn.functional.cross_entropy(logits[0, [0, 2]], targets[0, [0, 2]])
    assert torch.equal(language_loss(logits, targets), expected)


@pytest.mark.parametrize("kind", ["mlp", "linear", "gmm"])
def test_permuting_experts_permutes_the_decision_and_nothing_else(kind: str) -> None:
    router = Router(kind, 16, 6, 5).double()
    router.reset_parameters(0.5)
    x = torch.randn(9, 16, dtype=torch.float64)
    order = torch.randperm(5)
    before = route(router(x), 2, SITE)
    with torch.no_grad():
        rows = router.centroids if kind == "gmm" else router.output.weight
        rows.copy_(rows[order].clone())
    after = route(router(x), 2, SITE)
    assert torch.equal(order[after.experts_MK], before.experts_MK)
    torch.testing.assert_close(after.gates_MK, before.gates_MK)


def test_gates_are_probabilities_over_all_experts_in_falling_order() -> None:
    routing = route(torch.randn(8, 6), 3, SITE)
    assert (routing.gates_MK.diff(dim=1) <= 0).all()
    assert (routing.gates_MK.sum(1) < 1).all()
    torch.testing.assert_close(routing.gates_MK, routing.log_probs_ME.exp().gather(1, routing.experts_MK))


def test_competing_rows_join_the_softmax_behind_the_bases_experts() -> None:
    router = Router("mlp", 16, 6, 3)
    router.reset_parameters(0.02)
    rows = RouterRows(6, 2)
    with torch.no_grad():
        rows.bias.fill_(50.0)
    routing = route(router(torch.randn(4, 16), [rows]), 2, SITE)
    assert routing.num_experts == 5 and (routing.experts_MK >= 3).all()
