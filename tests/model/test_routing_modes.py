"""Routing with old gates preserved, and with a null choice: the decisions themselves, and what is computed for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mfext.model.experts import FeedForwardExperts, mix_feedforward
from mfext.model.losses import concentration_loss, routing_loss
from mfext.model.router import Site, route, route_preserving, without_null

SITE = Site(0, "feedforward")


def logits(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def test_preserved_gates_are_the_bases_bit_for_bit_where_no_new_expert_is_chosen() -> None:
    old_NE, new_NE = logits(4000, 7), logits(4000, 3, seed=1)
    base, grown = route(old_NE, 3, SITE), route_preserving(torch.cat([old_NE, new_NE], 1), [7, 3], 3, SITE)
    untouched_N = (grown.experts_MK < 7).all(1)
    assert 0 < untouched_N.sum() < 4000
    assert torch.equal(grown.experts_MK[untouched_N], base.experts_MK[untouched_N])
    assert torch.equal(grown.gates_MK[untouched_N], base.gates_MK[untouched_N])


def test_a_displaced_token_keeps_the_old_gates_of_the_old_experts_it_still_uses() -> None:
    old_NE = logits(500, 5)
    grown = route_preserving(torch.cat([old_NE, logits(500, 2, seed=1)], 1), [5, 2], 2, SITE)
    gates_NE = torch.zeros(500, 7).scatter(1, grown.experts_MK, grown.gates_MK)[:, :5]
    expected_NE = F.softmax(old_NE, -1)
    assert torch.equal(gates_NE[gates_NE > 0], F.log_softmax(old_NE, -1).exp()[gates_NE > 0])
    assert torch.allclose(gates_NE[gates_NE > 0], expected_NE[gates_NE > 0])


def test_preserving_chooses_what_the_joint_softmax_ranks_highest_and_each_generation_is_gated_over_all_before() -> None:
    sizes, everything_NE = [4, 2, 3], logits(300, 9).double()
    routing = route_preserving(everything_NE, sizes, 4, SITE)
    assert torch.equal(routing.experts_MK, everything_NE.topk(4, dim=1).indices)
    gates_NE = torch.cat(
        [F.softmax(everything_NE[:, :end], -1)[:, begin:end] for begin, end in ((0, 4), (4, 6), (6, 9))], dim=1
    )
    torch.testing.assert_close(routing.gates_MK, gates_NE.gather(1, routing.experts_MK), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(routing.log_probs_ME, F.log_softmax(everything_NE, -1))
    assert routing.num_experts == 9


def test_a_later_preserving_generation_leaves_the_gates_of_an_earlier_one_bit_for_bit() -> None:
    first_NE, later_NE = logits(2000, 6), logits(2000, 2, seed=3)
    before = route_preserving(first_NE, [4, 2], 2, SITE)
    after = route_preserving(torch.cat([first_NE, later_NE], 1), [4, 2, 2], 2, SITE)
    untouched_N = (after.experts_MK < 6).all(1)
    assert (before.experts_MK[untouched_N] >= 4).any()
    assert torch.equal(after.gates_MK[untouched_N], before.gates_MK[untouched_N])
    assert torch.equal(after.experts_MK[untouched_N], before.experts_MK[untouched_N])


def test_new_logits_move_no_old_gate_and_get_their_gradient_from_new_gates_alone() -> None:
    old_NE, new_NE = logits(50, 4), logits(50, 2, seed=1).requires_grad_()
    routing = route_preserving(torch.cat([old_NE, new_NE], 1), [4, 2], 2, SITE)
    (old_only,) = torch.autograd.grad(
        (routing.gates_MK * (routing.experts_MK < 4)).sum(), new_NE, retain_graph=True, allow_unused=True
    )
    assert old_only is None or not old_only.any()
    (new_only,) = torch.autograd.grad((routing.gates_MK * (routing.experts_MK >= 4)).sum(), new_NE)
    assert new_only.any()


@pytest.mark.parametrize("num_chosen", [1, 2, 3])
def test_a_null_choice_is_no_row_and_the_others_are_counted_without_gaps(num_chosen: int) -> None:
    routing = route(logits(200, 4), num_chosen, SITE, generation=2, has_null=True)
    assert routing.num_experts == 3
    null_MK = routing.experts_MK == 3
    assert null_MK.any() and (null_MK.sum(1) <= 1).all(), "the null choice is one of the choices, not all of them"
    chosen = without_null(routing)
    assert len(chosen.rows_R) == (~null_MK).sum(), "one row for every choice that is an expert"
    for token in range(200):
        mine = chosen.rows_R == token
        assert chosen.routing.experts_MK[mine, 0].tolist() == routing.experts_MK[token][~null_MK[token]].tolist()
        assert torch.equal(chosen.routing.gates_MK[mine, 0], routing.gates_MK[token][~null_MK[token]])
        assert chosen.slots_R[mine].tolist() == list(range(int(mine.sum())))


def test_gates_beside_a_null_choice_are_those_of_the_softmax_with_it() -> None:
    routing = route(logits(40, 5), 2, SITE, has_null=True)
    torch.testing.assert_close(routing.gates_MK, F.softmax(routing.logits_ME, -1).gather(1, routing.experts_MK))


def test_mixing_what_is_left_equals_a_mix_in_which_the_null_expert_is_zero() -> None:
    torch.manual_seed(0)
    experts, with_zero = FeedForwardExperts(3, 6, 5).double(), FeedForwardExperts(4, 6, 5).double()
    with torch.no_grad():
        for each, padded in zip(experts.parameters(), with_zero.parameters(), strict=True):
            each.normal_()
            padded.zero_()[:3] = each
    x_ND, scores_NE = torch.randn(30, 6).double(), logits(30, 4).double()
    chosen = without_null(route(scores_NE, 2, SITE, has_null=True))
    change_RD = mix_feedforward(x_ND.index_select(0, chosen.rows_R), [experts], chosen.routing)
    mixed_ND = torch.zeros(30, 6).double().index_add(0, chosen.rows_R, change_RD)
    torch.testing.assert_close(mixed_ND, mix_feedforward(x_ND, [with_zero], route(scores_NE, 2, SITE)))


@pytest.mark.parametrize("kind", ["mi", "switch"])
def test_balance_beside_a_null_choice_is_balance_over_the_experts_alone(kind: str) -> None:
    scores_NE = logits(64, 4).double()
    beside = route(scores_NE, 4, SITE, has_null=True)
    alone = route(scores_NE[:, :3], 3, SITE)
    if kind == "mi":
        torch.testing.assert_close(routing_loss([beside], None, "mi"), routing_loss([alone], None, "mi"))
        torch.testing.assert_close(concentration_loss([beside], None), concentration_loss([alone], None))
    else:
        z_beside, z_alone = (0.1 * (each.logits_ME.logsumexp(-1) ** 2).mean() for each in (beside, alone))
        torch.testing.assert_close(
            routing_loss([beside], None, "switch") - z_beside, routing_loss([alone], None, "switch") - z_alone
        )


def test_the_balance_loss_pushes_no_token_to_or_from_the_null_choice() -> None:
    scores_NE = logits(64, 4).requires_grad_()
    routing_loss([route(scores_NE, 2, SITE, has_null=True)], None, "mi").backward()
    assert scores_NE.grad is not None
    assert not scores_NE.grad[:, 3].any() and scores_NE.grad[:, :3].any()
