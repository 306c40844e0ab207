"""Elastic weight consolidation against hand-made numbers, autograd, and a loop over single windows."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from mfext.errors import InputError
from mfext.model.language_model import ModelOutput
from mfext.model.losses import language_loss
from mfext.training.batch import Batch
from mfext.training.methods.ewc import Ewc, accumulate, fisher
from tests.training.tiny_training import RandomTokens, same_bits, tiny_model

torch.set_num_threads(1)
NOTHING = torch.zeros(1, 1)
OUTPUT, BATCH = ModelOutput(NOTHING, ()), Batch(NOTHING, NOTHING)


def two_weights(*values: float) -> nn.Linear:
    linear = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([values]))
    return linear


def windows(count: int) -> Mapping[str, Tensor]:
    parts = [RandomTokens(step, step + 1, 1, 0, 1)[0] for step in range(-(-count // 4))]
    return {key: torch.cat([part[key] for part in parts])[:count] for key in parts[0]}


def test_the_penalty_is_half_the_strength_times_the_weighted_squared_distance() -> None:
    method = Ewc({"weight": torch.tensor([[1.0, 2.0]])}, {"weight": torch.tensor([[0.5, 3.0]])}, strength=10.0)
    penalty = method.penalty(two_weights(2.0, 0.0), OUTPUT, BATCH)
    assert penalty.shape == () and penalty.item() == pytest.approx(10 / 2 * (0.5 * 1 + 3 * 4))


def test_its_gradient_is_autograds_also_scaled_as_accumulation_scales_it() -> None:
    model = tiny_model().double()
    generator = torch.Generator().manual_seed(2)
    draw = {name: torch.rand(each.shape, generator=generator).double() for name, each in model.named_parameters()}
    anchor = {name: each.detach() + 0.1 * draw[name] for name, each in model.named_parameters()}
    parameters = list(model.parameters())
    plain = sum(
        (draw[name] * (each - anchor[name]) ** 2).sum() for name, each in model.named_parameters()
    ) * torch.tensor(7.0 / 2)
    penalty = Ewc(anchor, draw, 7.0).penalty(model, OUTPUT, BATCH)
    torch.testing.assert_close(penalty, plain, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(plain / 4, parameters)
    found = torch.autograd.grad(penalty / 4, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_at_the_anchor_penalty_and_gradient_are_zero() -> None:
    linear = two_weights(3.0, -1.0)
    method = Ewc({"weight": linear.weight.detach().clone()}, {"weight": torch.ones(1, 2)}, 1e6)
    penalty = method.penalty(linear, OUTPUT, BATCH)
    penalty.backward()
    assert penalty.item() == 0 and linear.weight.grad is not None and not linear.weight.grad.any()


def test_a_weight_without_importance_is_free() -> None:
    method = Ewc({"weight": torch.zeros(1, 2)}, {"weight": torch.tensor([[0.0, 1.0]])}, 2.0)
    linear = two_weights(100.0, 3.0)
    penalty = method.penalty(linear, OUTPUT, BATCH)
    penalty.backward()
    assert penalty.item() == pytest.approx(9.0) and linear.weight.grad is not None
    assert linear.weight.grad.tolist() == [[0.0, 6.0]]


@pytest.mark.parametrize("count", [1, 5])
def test_fisher_is_the_mean_over_windows_of_the_squared_gradient_of_one(count: int) -> None:
    model, data = tiny_model(), windows(count)
    expected = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    for row in range(count):
        model.zero_grad()
        output = model(data["input_ids"][row : row + 1], document_starts=data["document_starts"][row : row + 1])
        language_loss(output.logits, data["targets"][row : row + 1]).backward()
        for name, each in model.named_parameters():
            expected[name] += 0 if each.grad is None else each.grad**2 / count
    halves = [{key: value[:2] for key, value in data.items()}, {key: value[2:] for key, value in data.items()}]
    found = fisher(model, halves)
    assert found.keys() == expected.keys() and all((each >= 0).all() for each in found.values())
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-5, atol=1e-12)


def test_fisher_leaves_weights_gradients_and_what_trains_as_they_were() -> None:
    model = tiny_model().train().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = fisher(model, [windows(2)])
    assert found["embedding.weight"].any(), "frozen parameters are weighed too"
    assert same_bits(model.state_dict(), before) and model.training
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["lm_head.weight"]
    assert all(each.grad is None for each in model.parameters())


def test_windows_without_a_scored_target_do_not_count_and_none_at_all_is_refused() -> None:
    model, data = tiny_model(), dict(windows(3))
    alone = fisher(model, [{key: value[:2] for key, value in data.items()}])
    data["targets"] = data["targets"].clone()
    data["targets"][2] = -100
    assert same_bits(fisher(model, [data]), alone)
    data["targets"][:] = -100
    for nothing in ([], [data]):
        with pytest.raises(InputError, match="no window"):
            fisher(model, nothing)


def test_importance_adds_up_over_stages_and_fades_with_each() -> None:
    first, second = {"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([10.0, 0.0])}
    assert accumulate(None, first, 0.5)["weight"].tolist() == [1.0, 2.0]
    assert accumulate(accumulate(None, first, 0.5), second, 0.5)["weight"].tolist() == [10.5, 1.0]


def test_an_anchor_of_another_model_is_refused() -> None:
    importance = {"weight": torch.ones(1, 2)}
    for anchor in ({"bias": torch.ones(1)}, {"weight": torch.ones(2, 2)}):
        with pytest.raises(InputError, match=r"does not fit the model: (bias|weight)"):
            Ewc(anchor, importance, 1.0).trainable(two_weights(0.0, 0.0))
