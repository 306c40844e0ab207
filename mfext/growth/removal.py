"""Generations that leave a model whole, and come back bit for bit.

No generation feeds an older one: without the newest the model is what it was before that growth, to the bit. Those
grown after one that leaves keep their tensors, but learned beside it: where it was open they now see another stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mfext.config import GenerationConfig, ModelConfig
from mfext.conversion import did_you_mean, from_mapping, to_mapping
from mfext.errors import InputError
from mfext.growth.apply import apply_plan, require_fit, set_config
from mfext.growth.plan import Plan, RemoveExperts
from mfext.model.generation import Generation
from mfext.model.moduleformer import ModuleFormer
from mfext.model.shapes import shapes_alone


def plan_removal(config: ModelConfig, names: Sequence[str]) -> Plan:
    """Plan that the generations `names` leave, the newest first. Raises InputError where there is no such one."""
    known = [generation.name for generation in config.generations]
    unknown = [name for name in names if name not in known]
    if unknown:
        fix = f"it has {', '.join(known)}{did_you_mean(unknown[0], known)}" if known else "it has none beyond its base"
        raise InputError(f"no generation '{unknown[0]}'", "model", fix)
    leaving = tuple(RemoveExperts(name) for name in reversed(known) if name in names)
    staying = tuple(each for each in config.generations if each.name not in names)
    return Plan(config, leaving, replace(config, generations=staying))


def removed_names(plan: Plan) -> tuple[str, ...]:
    """The generations a plan removes, in its order: the newest first."""
    return tuple(each.generation for each in plan.operations if isinstance(each, RemoveExperts))


def leave_last(plan: Plan) -> bool:
    """Whether those a plan removes are the newest: what is left then knows nothing of them."""
    staying = len(plan.after.generations)
    return plan.after.generations == plan.before.generations[:staying]


@dataclass(frozen=True, eq=False)
class RemovedGenerations:
    """What left a model: `tensors` holds its parameters by their names there, on the CPU; `before` is its config.

    `to_parts` gives what a folder can hold, `from_parts` takes it back.
    """

    before: ModelConfig
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    @property
    def after(self) -> ModelConfig:
        """The config of what is left."""
        return plan_removal(self.before, self.names).after

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors for a safetensors file, and plain JSON facts that say where they go."""
        return dict(self.tensors), {"before": to_mapping(self.before), "names": list(self.names)}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> RemovedGenerations:
        """What `to_parts` gave. Raises InputError where the facts are not such."""
        read = from_mapping(_Facts, facts, "removed generations")
        plan_removal(read.before, read.names)
        return cls(read.before, read.names, tensors)


@dataclass(frozen=True)
class _Facts:
    before: ModelConfig
    names: tuple[str, ...]


def remove_generations(model: ModuleFormer, plan: Plan) -> RemovedGenerations:
    """Carry out a plan of `plan_removal` in place, and return what left. Begin a new optimizer and a new cache.

    Raises InputError where the plan was made for another model.
    """
    require_fit(model, plan)
    names = removed_names(plan)
    prefixes = tuple(_prefix(number) for number, each in enumerate(plan.before.generations) if each.name in names)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    apply_plan(model, plan)
    return RemovedGenerations(plan.before, names, tensors)


@torch.no_grad()
def restore_generations(model: ModuleFormer, removed: RemovedGenerations) -> None:
    """Put every removed generation back in its place, in place: the same bits, and the config from before.

    Generations grown since stay behind them. Raises InputError where the model is not what the removal left, or one of
    that name is there.
    """
    left = len(removed.after.generations)
    newer = model.config.generations[left:]
    fix = "they left a model of another shape, or one of that name is there"
    fits = replace(model.config, generations=model.config.generations[:left]) == removed.after
    if not fits or {each.name for each in newer} & set(removed.names):
        raise InputError("the removed generations do not fit the model", "restore", fix)
    whole = replace(removed.before, generations=(*removed.before.generations, *newer))
    back: list[nn.Module] = list(model.generations)
    for number, own in enumerate(removed.before.generations):
        if own.name in removed.names:
            back.insert(number, _generation(model, removed, number, own))
    model.generations = nn.ModuleList(back)
    set_config(model, whole)


def _generation(model: ModuleFormer, removed: RemovedGenerations, number: int, own: GenerationConfig) -> Generation:
    weight, prefix = model.embedding.weight, _prefix(number)
    with shapes_alone():
        generation = Generation(own, removed.before)
    tensors = {name.removeprefix(prefix): each for name, each in removed.tensors.items() if name.startswith(prefix)}
    expected = {name: each.shape for name, each in generation.state_dict().items()}
    if {name: each.shape for name, each in tensors.items()} != expected:
        raise InputError(f"the tensors of generation '{own.name}' do not fit it", "restore", "the file is another's")
    generation.load_state_dict({name: each.to(weight) for name, each in tensors.items()}, assign=True)
    return generation.requires_grad_(False).train(model.training)


def _prefix(number: int) -> str:
    return f"generations.{number}."
