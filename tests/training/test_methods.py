"""What every method promises: what trains, what it adds to the loss, that it crosses to other processes."""

from __future__ import annotations

import csv
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from mfext.config import MethodName, TrainerConfig
from mfext.config_methods import LoraConfig
from mfext.errors import DivergedError, InputError
from mfext.growth.apply import apply_plan
from mfext.growth.plan import new_blocks, old_names, plan_expansion
from mfext.model.language_model import ModelOutput
from mfext.model.moduleformer import ModuleFormer
from mfext.training.batch import Batch
from mfext.training.fit import fit
from mfext.training.methods.ewc import Ewc
from mfext.training.methods.expand import Expand
from mfext.training.methods.frozen import Frozen
from mfext.training.methods.full import Full
from mfext.training.methods.grow import Grow
from mfext.training.methods.independent import Independent
from mfext.training.methods.joint import Joint
from mfext.training.methods.lora import Lora, add_adapters
from mfext.training.methods.lwf import Lwf
from mfext.training.methods.method import Method, declared, method_named
from mfext.training.methods.replay import Replay
from mfext.training.module import ContinualModuleFormer
from tests.training.tiny_training import (
    Commits,
    RandomTokens,
    TinyStream,
    check_every_resume,
    same_bits,
    tiny_model,
    tiny_settings,
    tiny_training,
    weights,
)

torch.set_num_threads(1)
NAMES: tuple[MethodName, ...] = get_args(MethodName)
EVERYTHING = ("full", "replay", "ewc", "lwf", "concentrate", "joint", "independent")


def prepared(name: MethodName) -> tuple[ModuleFormer, Method]:
    """A tiny model in the state the method wants, and the method with what it holds: the same every time."""
    model = tiny_model(grown=name == "grow")
    if name == "ewc":
        anchor = {key: value.detach().clone() for key, value in model.named_parameters()}
        return model, Ewc(anchor, {key: torch.ones_like(value) for key, value in anchor.items()}, 10.0)
    if name == "lwf":
        return model, Lwf(model, 1.0, 2.0)
    if name == "expand":
        plan = plan_expansion(model.config, 1)
        apply_plan(model, plan)
        return model, Expand(new_blocks(plan))
    if name == "lora":
        add_adapters(model, LoraConfig(rank=2, alpha=4.0), seed=3)
    return model, method_named(name)


def module_for(name: MethodName) -> ContinualModuleFormer:
    model, method = prepared(name)
    return ContinualModuleFormer(model, method=method)


def logged(folder: Path, column: str) -> list[str]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [row[column] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", NAMES)
def test_what_moves_in_a_fit_is_what_the_method_says_trains_and_weight_decay_reaches_nothing_else(
    tmp_path: Path, name: MethodName
) -> None:
    module = module_for(name)
    assert module.method.name == name
    before, trainable = weights(module), module.method.trainable(module.model)
    if name in EVERYTHING:
        assert trainable == before.keys()
    if name == "frozen":
        assert not trainable
        with pytest.raises(InputError, match="nothing to train"):
            fit(module, TinyStream(), tiny_settings(tmp_path), commit=Commits())
        return
    training = tiny_training(20, weight_decay=1.0)
    result = fit(module, TinyStream(), tiny_settings(tmp_path, training), commit=Commits())
    moved = {key for key, value in weights(module).items() if not torch.equal(value, before[key])}
    assert result.frozen_ok and moved == trainable


@pytest.mark.parametrize("name", NAMES)
def test_every_method_says_in_one_line_what_trains_and_where_a_stage_starts(name: MethodName) -> None:
    _, method = prepared(name)
    assert method.starts_from == ("base" if name in ("joint", "independent") else "previous")
    for text in (declared(name), method.describe()):
        assert text and "\n" not in text and len(text) < 120


@pytest.mark.parametrize("name", NAMES)
def test_model_and_method_pickle_and_train_on_alike(tmp_path: Path, name: MethodName) -> None:
    if name == "frozen":
        assert pickle.loads(pickle.dumps(Frozen())) == Frozen()
        return
    module = module_for(name)
    model, method = pickle.loads(pickle.dumps((module.model, module.method)))
    other = ContinualModuleFormer(model, method=method)
    for each, folder in ((module, "here"), (other, "there")):
        fit(each, TinyStream(), tiny_settings(tmp_path / folder, tiny_training(3)), commit=Commits())
    assert same_bits(weights(other), weights(module))


@pytest.mark.parametrize("name", ["ewc", "lwf", "lora", "expand", "replay"])
@pytest.mark.parametrize("micro", [None, 2])
def test_a_resumed_run_of_the_method_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, name: MethodName, micro: int | None
) -> None:
    training = tiny_training(commit_every_steps=3, micro_batch_size=micro)
    commits, module = check_every_resume(lambda: module_for(name), training, tmp_path), module_for(name)
    for state in commits.states:
        held = {key for key in state.tensors if key.startswith("weight/")}
        assert held == {f"weight/{key}" for key in module.method.trainable(module.model)}


def test_old_layers_keep_their_bits_under_their_new_numbers_while_the_new_one_trains(tmp_path: Path) -> None:
    before = tiny_model()
    plan = plan_expansion(before.config, 1)
    module = module_for("expand")
    fit(module, TinyStream(), tiny_settings(tmp_path, tiny_training(weight_decay=1.0)), commit=Commits())
    old, new = before.state_dict(), module.model.state_dict()
    renamed = old_names(plan)
    assert all(torch.equal(value, new[renamed[name]]) for name, value in old.items())
    assert set(new) - set(renamed.values()) == module.method.trainable(module.model)


def test_penalties_are_logged_and_a_method_without_one_leaves_the_cell_empty(tmp_path: Path) -> None:
    for name in ("ewc", "lwf", "concentrate", "full"):
        module = module_for(name)
        fit(module, TinyStream(), tiny_settings(tmp_path / name), commit=Commits())
    assert all(float(cell) > 0 for name in ("ewc", "lwf", "concentrate") for cell in logged(tmp_path / name, "penalty"))
    assert set(logged(tmp_path / "full", "penalty")) == {""}


def test_a_penalty_changes_the_loss_by_exactly_its_value() -> None:
    plain, module = module_for("full"), ContinualModuleFormer(tiny_model(), method=Constant(value=0.25))
    batch = RandomTokens(0, 1, 1, 0, 1)[0]
    difference = module.training_step(batch, 0) - plain.training_step(batch, 0)
    assert difference.item() == pytest.approx(0.25, abs=1e-6)


def test_a_penalty_that_is_not_finite_drops_the_step_and_ten_in_a_row_diverge(tmp_path: Path) -> None:
    module = ContinualModuleFormer(tiny_model(), method=Constant(value=math.inf))
    before = weights(module)
    with pytest.raises(DivergedError, match="the penalty was not finite 10 steps in a row"):
        fit(module, TinyStream(), tiny_settings(tmp_path, tiny_training(20)), commit=Commits())
    assert same_bits(weights(module), before)


@dataclass(frozen=True)
class Constant(Full):
    """Full fine-tuning with the same penalty at every step."""

    value: float = 0.0

    def penalty(self, model: nn.Module, output: ModelOutput, batch: Batch) -> Tensor:
        return output.logits.new_tensor(self.value)


def test_methods_made_of_an_earlier_stage_and_models_not_prepared_for_theirs_are_refused() -> None:
    for name in ("ewc", "lwf", "expand"):
        with pytest.raises(InputError, match=f"method={name} needs what the stage before it left"):
            method_named(name)
    model = tiny_model()
    with pytest.raises(InputError, match="no adapter"):
        Lora().trainable(model)
    with pytest.raises(InputError, match="no layer 2"):
        Expand((2,)).trainable(model)
    with pytest.raises(InputError, match="no generation"):
        Grow().trainable(model)
    assert [each.name for each in (Replay(), Joint(), Independent())] == ["replay", "joint", "independent"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ewc", "lora"])
def test_two_processes_train_what_one_trains_with_accumulation_two(tmp_path: Path, name: MethodName) -> None:
    training = tiny_training(12, micro_batch_size=2, log_every_steps=1)
    one, two = module_for(name), module_for(name)
    both = TrainerConfig(strategy="ddp", accelerator="cpu", devices=2, threads=1)
    fit(one, TinyStream(), tiny_settings(tmp_path / "one", training), commit=Commits())
    result = fit(two, TinyStream(), tiny_settings(tmp_path / "two", training, trainer=both), commit=Commits())
    assert result.frozen_ok
    for column in ("loss_nats_per_token", *(("penalty",) if name == "ewc" else ())):
        here, there = ([float(cell) for cell in logged(tmp_path / each, column)] for each in ("one", "two"))
        assert len(there) == 12 and there == pytest.approx(here, rel=1e-3, abs=1e-5)
