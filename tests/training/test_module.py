from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mfext.config import GateTraining, TrainingConfig
from mfext.config_pruning import PruningConfig
from mfext.errors import DivergedError, InputError
from mfext.growth.pruning import random_scores, restore_experts
from mfext.model.moduleformer import ModuleFormer
from mfext.training.batch import read_batch
from mfext.training.methods.full import Full
from mfext.training.module import ContinualModuleFormer
from tests.training.tiny_training import (
    CONFIG,
    GROWTH,
    RandomTokens,
    open_gate,
    same_bits,
    tiny_model,
    tiny_module,
    weights,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")  # its advice on workers and loggers, its own deprecations


class Poisoned(Dataset[Mapping[str, Tensor]]):
    """Random tokens; the model's loss is made NaN on the chosen items through `loss_mask`."""

    def __init__(self, length: int, bad: set[int]) -> None:
        self.clean, self.bad, self.length = RandomTokens(0, length, 1, 0, 1), bad, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        batch = dict(self.clean[index])
        if index in self.bad:
            batch["targets"] = torch.full_like(batch["targets"], -100)  # a mean over nothing is NaN
        return batch


def loader(steps: int = 6, bad: tuple[int, ...] = ()) -> DataLoader[Mapping[str, Tensor]]:
    return DataLoader(Poisoned(steps, set(bad)), batch_size=None)


def trainer(**arguments: object) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", **(quiet | arguments))


def test_it_trains_under_a_plain_trainer_with_its_own_accumulation_and_clipping() -> None:
    module = tiny_module()
    run = trainer(max_steps=3, accumulate_grad_batches=2, gradient_clip_val=0.01)
    run.fit(module, loader(6))
    assert run.global_step == 3
    assert run.callback_metrics["loss"] == pytest.approx(3.2, abs=0.2)
    assert run.callback_metrics["learning_rate"] == pytest.approx(module.settings.learning_rate * 0.1)


def test_clipping_limits_the_gradient_to_the_norm_asked_for() -> None:
    module = tiny_module()
    seen: list[float] = []

    class Watch(lightning.Callback):
        def on_before_zero_grad(self, trainer: lightning.Trainer, pl_module: object, optimizer: object) -> None:
            grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            if grads:
                seen.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer(max_steps=3, gradient_clip_val=0.01, callbacks=[Watch()]).fit(module, loader(3))
    assert module.record is not None and module.record.gradient_norm > 0.1
    assert seen and max(seen) <= 0.01 * (1 + 1e-5)


def test_unshifted_labels_give_the_loss_of_shifted_targets() -> None:
    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    shifted = read_batch({"input_ids": ids, "labels": ids, "attention_mask": mask}).targets_BT
    assert shifted.tolist() == [[6, 7, -100, -100], [9, 2, 3, -100]]


def test_a_batch_without_targets_names_its_keys() -> None:
    with pytest.raises(InputError, match=r"has the keys input_ids: it needs input_ids and either targets"):
        read_batch({"input_ids": torch.zeros(1, 2)})


@pytest.mark.parametrize("bad", [(0,), (1, 2), (5,)])
def test_a_non_finite_step_leaves_weights_and_optimizer_untouched(bad: tuple[int, ...]) -> None:
    poisoned, clean = tiny_module(), tiny_module()
    constant = {"learning_rate": 1e-3, "warmup_share": 0.0, "min_learning_rate_share": 1.0}
    for module, data in ((poisoned, loader(6, bad)), (clean, _without(bad))):
        module.settings = TrainingConfig(**constant)
        trainer(max_epochs=1, gradient_clip_val=1.0).fit(module, data)
    assert same_bits(weights(poisoned), weights(clean))
    assert same_bits(poisoned.current_optimizer_state(), clean.current_optimizer_state())
    assert poisoned.guard.skipped_windows == 4 * len(bad) and clean.guard.skipped_windows == 0


def _without(bad: tuple[int, ...]) -> DataLoader[Mapping[str, Tensor]]:
    kept = [RandomTokens(0, 6, 1, 0, 1)[index] for index in range(6) if index not in bad]
    return DataLoader(kept, batch_size=None)


def test_ten_non_finite_steps_in_a_row_are_a_diverged_run() -> None:
    module = tiny_module()
    before = weights(module)
    with pytest.raises(DivergedError, match="10 steps in a row"):
        trainer(max_epochs=1).fit(module, loader(12, tuple(range(12))))
    assert same_bits(weights(module), before)


def test_non_finite_steps_with_a_good_one_between_train_on() -> None:
    module = tiny_module()
    trainer(max_epochs=1).fit(module, loader(13, tuple(step for step in range(13) if step != 6)))
    assert module.guard.skipped_windows == 48 and module.guard.bad_in_a_row == 6


def test_growing_trains_the_newest_generation_without_its_gate_and_nothing_else_moves() -> None:
    module = tiny_module()
    trainer(max_steps=2).fit(module, loader(2))
    module.grow(GROWTH, "code")
    open_gate(module.model)
    before = weights(module)
    module.settings = TrainingConfig(weight_decay=0.5)
    trainer(max_steps=6).fit(module, loader(6))
    after = weights(module)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(name.startswith("generations.0.") and ".gate." not in name for name in moved)
    trained = {name.rpartition("/")[0] for name in module.current_optimizer_state()}
    assert moved <= trained and all(name.startswith("generations.0.") for name in trained)


def test_growing_leaves_old_logits_unchanged_and_detaching_brings_the_model_back() -> None:
    module = tiny_module()
    ids = RandomTokens(0, 1, 1, 0, 1)[0]["input_ids"]
    with torch.inference_mode():
        logits, before = module(ids).logits, weights(module)
        plan = module.plan(GROWTH, "code")
        assert same_bits(weights(module), before)
        assert module.grow(GROWTH, "code") == plan
        assert torch.equal(module(ids).logits, logits)
        module.detach()
        assert torch.equal(module(ids).logits, logits)
    assert same_bits(weights(module), before) and module.model.config == CONFIG


def test_growing_with_text_teaches_the_gate_where_to_open() -> None:
    size = {"steps": 30, "batch_size": 8, "probe_sequences": 16, "probe_length": 24}
    before = replace(GROWTH, gate=GateTraining(learns="before", negatives_share=0, learning_rate=0.02, **size))
    after = replace(before, gate=replace(before.gate, learns="after"))
    text, zeros = torch.full((16, 24), 7), torch.zeros(2, 24, dtype=torch.long)
    first, last = tiny_module(), tiny_module()
    first.grow(before, "sevens", text)
    last.grow(after, "sevens", text)
    with torch.inference_mode():
        held = last(zeros).gates
    assert held is not None and (held == 1).all()
    last.teach_gate(after, text)
    with torch.inference_mode():
        for module in (first, last):
            gates, closed = module(text[:2]).gates, module(zeros).gates
            assert gates is not None and (gates[:, 4:] > 0).all()
            assert closed is not None and (closed[:, 4:] < 1).all()
    with pytest.raises(InputError, match="at least 8"):
        first.grow(before, "too-few", text[:3])
    with pytest.raises(InputError, match="at least 8"):
        last.teach_gate(after, text[:3])
    with pytest.raises(InputError, match="no domain gate"):
        tiny_module().teach_gate(after, text)


def test_its_gates_are_calibrated_as_on_samples_whatever_probe_the_settings_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes: list[str] = []
    monkeypatch.setattr("mfext.training.module.train_gate", lambda *given: probes.append(given[3].probe))
    monkeypatch.setattr("mfext.training.module.grow", lambda *given: probes.append(given[2].gate.probe))
    growth = replace(GROWTH, gate=GateTraining(probe="reservoir", probe_sequences=8, probe_length=8))
    text, module = torch.full((8, 24), 7), tiny_module(grown=True)
    module.grow(growth, "sevens", text)
    module.teach_gate(growth, text)
    assert probes == ["self", "self"]


def test_moments_of_what_still_trains_survive_a_growth_by_name() -> None:
    module = tiny_module()
    trainer(max_steps=2).fit(module, loader(2))
    module.grow(GROWTH, "code")
    module.choose(Full())
    optimizer = module.configure_optimizers()
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {2} and len(optimizer.state) == len(dict(tiny_model().named_parameters()))


def test_a_gate_closed_on_the_whole_batch_trains_nothing_and_fails_nothing() -> None:
    module = tiny_module(grown=True)
    gate = module.model.generation(1).gate
    assert gate is not None
    with torch.no_grad():
        [bias for name, bias in gate.named_parameters() if name.endswith("bias")][-1].fill_(-50.0)
    before = weights(module)
    trainer(max_steps=2).fit(module, loader(2))
    assert same_bits(weights(module), before)


def test_a_frozen_model_refuses_to_train() -> None:
    module = tiny_module().freeze()
    assert isinstance(module, ContinualModuleFormer)
    with pytest.raises(InputError, match="nothing to train"):
        trainer(max_steps=1).fit(module, loader(1))


def test_experts_leave_by_their_scores_and_come_back() -> None:
    module = tiny_module()
    before, config = {name: value.clone() for name, value in weights(module).items()}, module.model.config
    removed = module.prune(random_scores(config, 1), PruningConfig(criterion="random", keep=0.75))
    assert sum(each.numel() for each in module.model.parameters()) < sum(each.numel() for each in before.values())
    assert not any(each.requires_grad for each in module.model.parameters())
    assert isinstance(module.model, ModuleFormer)
    restore_experts(module.model, removed)
    assert same_bits(weights(module), before) and module.model.config == config
    with pytest.raises(InputError, match="least possible"):
        module.prune(random_scores(config, 1), PruningConfig(criterion="random", keep=0.01))
