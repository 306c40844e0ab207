"""Load concentration: which way it pulls, on which routers, how it rises, and that nothing pulls against it."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from mfext.config_methods import ConcentrateConfig
from mfext.errors import InputError
from mfext.model.language_model import ModelOutput
from mfext.model.moduleformer import ModuleFormer
from mfext.training.batch import Batch, read_batch
from mfext.training.fit import fit
from mfext.training.methods.concentrate import Concentrate
from mfext.training.methods.full import Full
from mfext.training.module import ContinualModuleFormer
from tests.training.tiny_training import (
    CONFIG,
    Commits,
    RandomTokens,
    TinyStream,
    check_every_resume,
    tiny_dense_model,
    tiny_model,
    tiny_settings,
    tiny_training,
)

torch.set_num_threads(1)
Kinds = Literal["both", "attention", "feedforward"]


def batch(**changes: object) -> Batch:
    return replace(read_batch(RandomTokens(0, 1, 1, 0, 1)[0]), **changes)


def output_of(model: ModuleFormer, read: Batch) -> ModelOutput:
    output: ModelOutput = model(
        read.input_ids_BT, document_starts=read.document_starts_BT, attention_mask=read.attention_mask_BT
    )
    return output


def opinionated(model: ModuleFormer) -> ModuleFormer:
    """Everything trains, and routers are far from uniform: there the entropy is flat."""
    with torch.no_grad():
        for name, each in model.requires_grad_(True).named_parameters():
            if "router" in name:
                each *= 10
    return model


def entropies(model: ModuleFormer, read: Batch) -> dict[str, float]:
    """H(e) in nats of every router by generation and site, from the mean of its probabilities, counted by hand."""
    with torch.no_grad():
        routings = output_of(model, read).routings
    means = {f"{each.generation} {each.site}": each.log_probs_ME.double().exp().mean(0) for each in routings}
    return {name: -float((mean * mean.log()).sum()) for name, mean in means.items()}


@pytest.mark.parametrize("kinds", ["both", "attention", "feedforward"])
def test_the_penalty_is_the_weight_times_the_entropies_of_its_kinds_in_every_generation(kinds: Kinds) -> None:
    model, read = opinionated(tiny_model(grown=True)), batch()
    all_entropies = entropies(model, read)
    assert len(all_entropies) == 2 * 2 * 2 and any(name.startswith("1 ") for name in all_entropies)
    expected = sum(value for name, value in all_entropies.items() if kinds == "both" or name.endswith(kinds))
    method = Concentrate(ConcentrateConfig(weight=0.5, kinds=kinds))
    assert method.penalty(model, output_of(model, read), read).item() == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.parametrize("kinds", ["both", "attention", "feedforward"])
def test_a_step_along_its_gradient_lowers_the_entropies_of_its_kinds_and_moves_no_other_router(kinds: Kinds) -> None:
    model, read = opinionated(tiny_model(grown=True)), batch()
    before = entropies(model, read)
    penalty = Concentrate(ConcentrateConfig(weight=1.0, kinds=kinds)).penalty(model, output_of(model, read), read)
    penalty.backward()
    # A last layer's router has no other behind it: what is not asked for there must have no gradient at all.
    last = {name: each for name, each in model.named_parameters() if re.search(r"(blocks|layers)\.1\..*router", name)}
    moved = {
        "attention" if "attention" in name else "feedforward" for name, each in last.items() if each.grad is not None
    }
    assert len(last) == 2 * 2 * 3 and moved == ({"attention", "feedforward"} if kinds != "attention" else {"attention"})
    with torch.no_grad():
        for name, each in last.items():
            if each.grad is not None and kinds in ("both", "attention" if "attention" in name else "feedforward"):
                each -= 0.5 * each.grad
    after = entropies(model, read)
    chosen = [name for name in before if "layer 1" in name and (kinds == "both" or name.endswith(kinds))]
    assert len(chosen) == (4 if kinds == "both" else 2) and all(after[name] < before[name] for name in chosen)


def test_padding_does_not_count() -> None:
    model, read = tiny_model(), batch()
    mask_BT = torch.ones_like(read.input_ids_BT)
    mask_BT[:, -3:] = 0
    padded = replace(read, attention_mask_BT=mask_BT)
    shorter = Batch(*(each[:, :-3] for each in (read.input_ids_BT, read.targets_BT, read.document_starts_BT)))
    method = Concentrate()
    found, expected = (method.penalty(model, output_of(model, each), each) for each in (padded, shorter))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_weight_rises_along_a_line_over_its_share_of_the_stage_and_then_stays() -> None:
    method = Concentrate(ConcentrateConfig(weight=0.4, rise_share=0.5))
    assert [method.weight_at(each) for each in (0.0, 0.125, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert Concentrate(ConcentrateConfig(weight=0.4, rise_share=0.0)).weight_at(0.0) == 0.4


def penalties(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["penalty"]) for row in csv.DictReader(file)]


def test_in_a_fit_the_penalty_starts_at_zero_rises_and_the_entropy_falls_where_full_training_keeps_it(
    tmp_path: Path,
) -> None:
    training = tiny_training(40, log_every_steps=1, learning_rate=1e-2)
    ends = {}
    for name, method in (("full", Full()), ("concentrate", Concentrate(ConcentrateConfig(weight=0.3)))):
        module = ContinualModuleFormer(tiny_model(), method=method)
        fit(module, TinyStream(), tiny_settings(tmp_path / name, training), commit=Commits())
        assert isinstance(module.model, ModuleFormer) and module.progress == 1.0
        ends[name] = sum(entropies(module.model, batch()).values())
    logged = penalties(tmp_path / "concentrate")
    assert logged[0] == 0 and logged[1] > 0 and logged[2] == pytest.approx(2 * logged[1], rel=0.1)
    assert ends["concentrate"] < 0.7 * ends["full"]


@pytest.mark.parametrize("micro", [None, 2])
def test_resumed_inside_and_after_the_rise_it_equals_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, micro: int | None
) -> None:
    def module() -> ContinualModuleFormer:
        return ContinualModuleFormer(tiny_model(), method=Concentrate(ConcentrateConfig(weight=0.3, rise_share=0.6)))

    training = tiny_training(9, commit_every_steps=2, micro_batch_size=micro)
    assert len(check_every_resume(module, training, tmp_path).states) == 4


def test_the_balance_loss_that_spreads_the_load_is_left_out() -> None:
    losses: list[Tensor] = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        model = ModuleFormer(replace(CONFIG, routing_loss_weight=weight))
        losses.append(
            ContinualModuleFormer(model, method=Concentrate()).training_step(RandomTokens(0, 1, 1, 0, 1)[0], 0)
        )
    assert losses[0].item() == losses[1].item()


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(InputError, match="no experts"):
        Concentrate().trainable(tiny_dense_model())


@pytest.mark.parametrize("wrong", [{"weight": 0.0}, {"rise_share": 1.5}, {"kinds": "router"}])
def test_settings_without_meaning_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConcentrateConfig(**wrong)
