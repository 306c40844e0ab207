from __future__ import annotations

import pytest
import torch
from torch import nn

from mfext.config import TrainingConfig
from mfext.errors import InputError
from mfext.growth.apply import freeze
from mfext.training.optimizer_state import (
    decays,
    load_optimizer_state_by_name,
    make_optimizer,
    optimizer_state_by_name,
)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = make_optimizer(model, TrainingConfig())
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def model_of(*names: str) -> nn.ModuleDict:
    torch.manual_seed(0)

    class Sum(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([layer(x) * (index + 1) for index, layer in enumerate(self.values())]).sum(0)

    return Sum({name: nn.Linear(3, 3) for name in names})


def test_state_goes_back_to_the_parameter_of_its_name_when_the_order_changed() -> None:
    state = optimizer_state_by_name(stepped(model := model_of("a", "b")), model)
    other = model_of("b", "a")
    optimizer = make_optimizer(other, TrainingConfig())
    assert load_optimizer_state_by_name(optimizer, other, state) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert torch.equal(optimizer_state_by_name(optimizer, other)["a.weight/exp_avg"], state["a.weight/exp_avg"])
    assert not torch.equal(state["a.weight/exp_avg"], state["b.weight/exp_avg"])


def test_state_of_frozen_parameters_is_passed_over_and_new_parameters_start_fresh() -> None:
    state = optimizer_state_by_name(stepped(model := model_of("a", "b")), model)
    grown = model_of("a", "b", "c")
    for parameter in grown["a"].parameters():
        parameter.requires_grad_(False)
    optimizer = make_optimizer(grown, TrainingConfig())
    assert load_optimizer_state_by_name(optimizer, grown, state) == {"b.weight", "b.bias"}
    assert {name.split(".")[0] for name in optimizer_state_by_name(optimizer, grown)} == {"b"}


def test_loaded_state_is_a_copy() -> None:
    optimizer = stepped(model := model_of("a"))
    state = optimizer_state_by_name(optimizer, model)
    before = {name: value.clone() for name, value in state.items()}
    other = model_of("a")
    loaded = make_optimizer(other, TrainingConfig())
    load_optimizer_state_by_name(loaded, other, state)
    other(torch.ones(2, 3)).sum().backward()
    loaded.step()
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_state_of_another_shape_is_refused() -> None:
    state = optimizer_state_by_name(stepped(model := model_of("a")), model)
    state["a.weight/exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(InputError, match=r"exp_avg of a\.weight has shape \(2, 2\)"):
        load_optimizer_state_by_name(make_optimizer(model, TrainingConfig()), model, state)


def test_matrices_decay_and_vectors_norms_and_embeddings_do_not() -> None:
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert decays("blocks.0.feedforward.experts.up", torch.zeros(2, 2, 2)) and decays("lm_head.weight", matrix)
    assert not decays("embedding.weight", matrix) and not decays("generations.0.embedding.left", matrix)
    assert not decays("blocks.0.attention_norm.weight", vector) and not decays("blocks.0.attention.key.bias", vector)


def test_a_wholly_frozen_model_is_refused() -> None:
    model = model_of("a")
    freeze(model)
    with pytest.raises(InputError, match="nothing to train"):
        make_optimizer(model, TrainingConfig())
