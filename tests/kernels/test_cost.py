"""What training and decoding cost, in counted work: what is frozen costs nothing, and nothing grows faster than it may.

No seconds: operations, floating-point operations, bytes and sizes are the same on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfext.config import GrowthConfig, TrainingConfig
from mfext.growth.apply import apply_plan, set_trainable
from mfext.growth.plan import plan_growth
from mfext.model.generate import Sampling
from mfext.model.losses import language_loss, routing_loss
from mfext.model.moduleformer import ModuleFormer
from mfext.training.methods.full import Full
from mfext.training.methods.grow import Grow
from mfext.training.optimizer_state import make_optimizer, optimizer_state_by_name
from mfext_kernels.grouped_linear import expert_feedforward
from mfext_kernels.routing import make_dispatch
from mfext_kernels.stickbreaking import compiled
from tests.kernels.counting import Counted, counted, stored
from tests.training.tiny_training import CONFIG, open_gate

COMMITTED = Path(__file__).parent / "counted_work.json"
TINY = replace(CONFIG, d_feedforward=32)
EXPERTS_ONLY = GrowthConfig(embedding_rank=0, head_rank=0)


def tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(2, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


def made(**changes: object) -> ModuleFormer:
    torch.manual_seed(0)
    return ModuleFormer(replace(TINY, **changes))


def grown(num_layers: int, growth: GrowthConfig) -> ModuleFormer:
    """With a generation that is open on every token and trains alone."""
    model = made(num_layers=num_layers)
    apply_plan(model, plan_growth(model.config, growth, "code"))
    open_gate(model)
    set_trainable(model, Grow().trainable(model))
    return model


def loss_of(model: ModuleFormer, ids_BT: Tensor) -> Tensor:
    output = model(ids_BT)
    return language_loss(output.logits, ids_BT) + 1e-3 * routing_loss(output.routings, None, "mi")


def backward_work(model: ModuleFormer, ids_BT: Tensor) -> Counted:
    loss = loss_of(model, ids_BT)
    return counted(loss.backward)


# -- what is frozen costs nothing ------------------------------------------------------------------


def test_layers_below_the_first_trainable_one_keep_nothing_for_backward_and_have_no_gradient_and_no_state() -> None:
    model = grown(4, replace(EXPERTS_ONLY, layers="top_half"))
    watched = {f"layer {number}": block for number, block in enumerate(model.blocks)}
    optimizer = make_optimizer(model, TrainingConfig())
    with stored(watched) as kept:
        loss = loss_of(model, tokens())
    loss.backward()
    optimizer.step()
    assert kept.bytes.keys() == {"layer 2", "layer 3", "outside"} and min(kept.bytes.values()) > 0
    own = Grow().trainable(model)
    assert {name for name, each in model.named_parameters() if each.grad is not None} == own
    assert {name.rpartition("/")[0] for name in optimizer_state_by_name(optimizer, model)} == own


@pytest.mark.parametrize("where", ["embedding_rank", "norms", "key_value_rank"])
def test_a_change_further_down_makes_everything_above_it_keep_what_backward_needs(where: str) -> None:
    growth = replace(EXPERTS_ONLY, layers="top_half", **{where: True if where == "norms" else 4})
    model = grown(4, growth)
    with stored({f"layer {number}": block for number, block in enumerate(model.blocks)}) as kept:
        loss_of(model, tokens())
    assert {f"layer {number}" for number in range(4)} < kept.bytes.keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_further_down_add_nothing_to_the_backward_pass(checkpointing: bool) -> None:
    def flops(layers: int) -> int:
        model = grown(layers, replace(EXPERTS_ONLY, layers=(layers - 2, layers - 1)))
        model.set_gradient_checkpointing(checkpointing)
        return backward_work(model, tokens()).flops

    assert flops(6) == flops(2) > 0


def test_frozen_matrices_beside_trainable_ones_cost_no_product_of_their_own_gradient() -> None:
    """Backward through a product is two products of its size: one for the input, one for the matrix."""
    ids = tokens()
    model = grown(2, EXPERTS_ONLY)
    forward = counted(lambda: loss_of(model, ids)).flops
    new_only = backward_work(model, ids).flops
    set_trainable(model, Full().trainable(model))
    everything = backward_work(model, ids).flops
    matrices = matrix_flops(model, ids)
    assert everything - new_only >= matrices, "each old matrix's own gradient is one product as large as forward's"
    assert new_only < 0.35 * everything and new_only < 0.7 * forward


def matrix_flops(model: ModuleFormer, ids_BT: Tensor) -> int:
    """Of one forward's products with old matrices of experts, keys, values, head: 2 x weights used x tokens."""
    config = model.config
    chosen = config.attention_experts_per_token, config.feedforward_experts_per_token
    width, inner, hidden = config.d_model, config.d_attention, config.d_feedforward
    a_layer = 2 * width * inner * chosen[0] + 2 * width * inner + 2 * width * hidden * chosen[1]
    return 2 * ids_BT.numel() * (config.num_layers * a_layer + width * config.vocab_size)


# -- how the cost grows ----------------------------------------------------------------------------


def test_a_train_step_costs_the_same_for_every_further_layer() -> None:
    def flops(num_layers: int) -> int:
        model = made(num_layers=num_layers)
        return counted(lambda: loss_of(model, tokens()).backward()).flops

    two, four, six = (flops(layers) for layers in (2, 4, 6))
    assert six - four == four - two > 0


def test_expert_layers_cost_at_most_in_proportion_to_the_tokens() -> None:
    def work(num_tokens: int) -> Counted:
        generator = torch.Generator().manual_seed(1)
        x, gates = torch.randn(num_tokens, 16, generator=generator), torch.rand(num_tokens, 2, generator=generator)
        up, down = torch.randn(4, 16, 32, generator=generator), torch.randn(4, 32, 16, generator=generator)
        experts = torch.rand(num_tokens, 4, generator=generator).topk(2, dim=-1).indices
        leaves = [each.requires_grad_() for each in (x, gates, up, down)]

        def run() -> None:
            y = expert_feedforward(x, [up], [down], gates, make_dispatch(experts, 4))
            torch.autograd.grad(y, leaves, torch.ones_like(y))

        return counted(run)

    small, large = work(512), work(2048)
    assert large.flops == 4 * small.flops and large.bytes <= 4 * small.bytes
    assert large.operations == small.operations


def lasting(model: ModuleFormer) -> ModuleFormer:
    """Sticks that last: every logit is far below zero, so that no key may be passed over."""
    with torch.no_grad():
        for block in model.blocks:
            attention = block.attention
            assert attention.key is not None
            attention.key.bias.fill_(-4.0)
            attention.experts.query.zero_()
            block.attention_norm.bias.fill_(1.0)
            attention.experts.query[:, 0].fill_(1.0)
            attention.key.weight.zero_()
    return model


def grown_open() -> ModuleFormer:
    return grown(1, EXPERTS_ONLY)


@pytest.mark.parametrize("make", [partial(made, num_layers=1), grown_open], ids=["plain", "grown"])
def test_training_is_at_most_quadratic_in_length_and_never_holds_a_square_of_it(
    make: Callable[[], ModuleFormer],
) -> None:
    model = lasting(make())
    work = {}
    for length in (1024, 2048):
        ids = tokens(1, length)
        work[length] = counted(lambda ids=ids: loss_of(model, ids).backward())
        assert work[length].largest <= length * length / 2
        assert not [shape for shape in work[length].shapes if sum(size >= length for size in shape) > 1]
    assert work[1024].flops * 2 < work[2048].flops <= 4 * work[1024].flops, (
        "the sticks lasted, and no more than squares"
    )
    assert work[2048].largest <= 2 * work[1024].largest and work[2048].bytes <= 4 * work[1024].bytes


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_never_holds_a_square_of_the_length(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFEXT_NATIVE", "0")
    model, length = lasting(made(num_layers=1)), 1024
    work = counted(lambda: model.generate(tokens(batch, length), sampling=Sampling(max_new_tokens=4)))
    assert work.largest < length * length / 2
    assert not [shape for shape in work.shapes if sum(size >= length for size in shape) > 1]


def test_a_square_would_be_noticed() -> None:
    with Counted() as work:
        torch.ones(64, 64)
    assert [shape for shape in work.shapes if sum(size >= 64 for size in shape) > 1] and work.largest == 64 * 64


def test_sixteen_times_the_experts_at_the_same_number_chosen_cost_a_forward_at_most_15_percent_more() -> None:
    def flops(experts: int) -> int:
        model = made(
            d_model=256, num_heads=4, d_attention=128, d_feedforward=256, d_router=64, num_layers=1,
            attention_experts=experts, feedforward_experts=experts,
        )  # fmt: skip
        with torch.no_grad():
            return counted(lambda: model(tokens())).flops

    assert 1 < flops(128) / flops(8) <= 1.15


# -- the gate against regressions ------------------------------------------------------------------


def test_a_train_step_does_no_more_work_than_committed() -> None:
    """Raise the numbers in counted_work.json only with a reason; lower them where work was saved."""
    if not compiled.available():
        pytest.skip(f"counted where attention's compiled pass is: {compiled.explain()}")
    model = made()
    optimizer = make_optimizer(model, TrainingConfig())

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, tokens()).backward()
        optimizer.step()

    step()
    work = counted(step)
    committed = json.loads(COMMITTED.read_text())
    found = {"operations": work.operations, "flops": work.flops, "bytes": work.bytes}
    assert found.keys() == committed.keys()
    for name, value in found.items():
        share = value / committed[name]
        assert share <= 1.02, f"{name}: {value}, {share - 1:.1%} above what is committed"
        assert share >= 0.95, f"{name}: {value}, {1 - share:.1%} below what is committed: lower it there"
