"""A model of a few thousand numbers and a stream of random tokens, shared by the training tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mfext.config import GrowthConfig, ModelConfig, TrainingConfig
from mfext.config_machine import TrainerConfig
from mfext.growth.apply import apply_plan
from mfext.growth.plan import plan_growth
from mfext.model.dense import DenseTransformer
from mfext.model.moduleformer import ModuleFormer
from mfext.training.exchange import FitSettings, ProgressState
from mfext.training.fit import fit
from mfext.training.module import ContinualModuleFormer

CONFIG = ModelConfig(
    vocab_size=24,
    d_model=16,
    num_layers=2,
    num_heads=2,
    d_attention=16,
    attention_experts=3,
    attention_experts_per_token=2,
    feedforward_experts=4,
    feedforward_experts_per_token=2,
    d_feedforward=16,
    d_router=8,
    bos_id=0,
    eos_id=0,
    pad_id=1,
)
GROWTH = GrowthConfig(attention_experts=2, feedforward_experts=2, embedding_rank=4, head_rank=4)
BATCH, LENGTH = 4, 12


class RandomTokens(Dataset[Mapping[str, Tensor]]):
    """Micro-batches [start, end) x accumulation of one process, out of one global order."""

    def __init__(self, start: int, end: int, accumulation: int, rank: int, world: int) -> None:
        self.start, self.end, self.accumulation, self.rank, self.world = start, end, accumulation, rank, world

    def __len__(self) -> int:
        return (self.end - self.start) * self.accumulation

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, micro = divmod(index, self.accumulation)
        step += self.start
        generator = torch.Generator().manual_seed(1000 + step)
        everything = torch.randint(2, CONFIG.vocab_size // 2, (BATCH, LENGTH + 1), generator=generator)
        rows = BATCH // (self.accumulation * self.world)
        first = (micro * self.world + self.rank) * rows
        tokens = everything[first : first + rows]
        return {
            "input_ids": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "document_starts": torch.zeros_like(tokens[:, 1:]),
        }


@dataclass(frozen=True)
class TinyStream:
    """Order a pure function of the step."""

    def dataset(
        self, start_step: int, end_step: int, accumulation: int, rank: int, world: int
    ) -> Dataset[Mapping[str, Tensor]]:
        return RandomTokens(start_step, end_step, accumulation, rank, world)


@dataclass
class Commits:
    """Keeps copies of what is committed."""

    states: list[ProgressState] = field(default_factory=list)

    def __call__(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object], /) -> None:
        copies = {name: value.detach().clone() for name, value in tensors.items()}
        self.states.append(ProgressState(step, copies, dict(state)))


def tiny_model(grown: bool = False) -> ModuleFormer:
    """The same weights every time; with a generation whose gate is open everywhere where `grown`."""
    torch.manual_seed(0)
    model = ModuleFormer(CONFIG)
    if grown:
        apply_plan(model, plan_growth(model.config, GROWTH, "code"))
        open_gate(model)
    return model


def tiny_dense_model() -> DenseTransformer:
    """The same widths without experts."""
    torch.manual_seed(0)
    one = {f"{kind}_experts{suffix}": 1 for kind in ("attention", "feedforward") for suffix in ("", "_per_token")}
    return DenseTransformer(replace(CONFIG, architecture="dense", routing_loss_weight=0.0, **one))


def open_gate(model: ModuleFormer) -> None:
    """Make the newest gate say 1 for every token."""
    gate = model.generation(len(model.generations)).gate
    assert gate is not None
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        last = [parameter for name, parameter in gate.named_parameters() if name.endswith("bias")][-1]
        last.fill_(50.0)


def tiny_module(grown: bool = False) -> ContinualModuleFormer:
    return ContinualModuleFormer(tiny_model(grown))


def tiny_training(steps: int = 8, **changes: object) -> TrainingConfig:
    values: dict[str, object] = {
        "tokens": steps * BATCH * LENGTH,
        "sequence_length": LENGTH,
        "batch_size": BATCH,
        "log_every_steps": 2,
        "commit_every_s": 1e9,
    }
    return TrainingConfig(**(values | changes))


def tiny_settings(folder: Path, training: TrainingConfig | None = None, **changes: object) -> FitSettings:
    values: dict[str, object] = {"log_folder": folder, "seed": 1, "stage": 1, "trainer": TrainerConfig(threads=1)}
    return FitSettings(training or tiny_training(), **(values | changes))


def weights(module: ContinualModuleFormer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.model.state_dict().items()}


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_every_resume(make: Callable[[], ContinualModuleFormer], training: TrainingConfig, folder: Path) -> Commits:
    """A fit resumed from each of its commits ends with the bits of the one never interrupted; the commits."""
    commits, whole = Commits(), make()
    result = fit(whole, TinyStream(), tiny_settings(folder / "whole", training), commit=commits)
    for state in commits.states:
        again = make()
        settings = tiny_settings(folder / f"from{state.step}", training)
        resumed = fit(again, TinyStream(), settings, commit=Commits(), resume=state)
        assert same_bits(weights(again), weights(whole)) and same_bits(resumed.optimizer, result.optimizer)
    return commits
