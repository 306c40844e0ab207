"""Remove experts for good, as many as a budget asks, and put them back bit for bit.

A pruned model is the full one with the removed experts' logits at minus infinity (masking.py proves it), only smaller:
the gates of those that stay are normalised over those that stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mfext.config import ModelConfig
from mfext.config_pruning import PruningConfig
from mfext.conversion import from_mapping, to_mapping
from mfext.errors import InputError
from mfext.growth.apply import apply_plan, put_parameter, require_fit, set_config
from mfext.growth.banks import (
    KINDS,
    BankKey,
    bank_keys,
    bank_parameters,
    expert_parameters,
    fewest_experts,
    num_experts,
    shown,
    softmax_banks,
    with_experts,
)
from mfext.growth.plan import BankCut, Plan, PruneExperts
from mfext.model.moduleformer import ModuleFormer

Scores = Mapping[BankKey, Sequence[float]]

# A megabyte of float32.
PARAMETERS_PER_MEGABYTE = 1e6 / 4
# Scores of these criteria mean the same in every bank, and may be negative: they are compared as they are.
COMPARABLE = ("ablation", "random")


@dataclass(frozen=True)
class _Bank:
    """A bank to choose from: scores per expert, how many must stay, and what one weighs in the budget's unit."""

    key: BankKey
    scores: tuple[float, ...]
    fewest: int
    weight: float

    @cached_property
    def ranked(self) -> tuple[int, ...]:
        """Experts, best first, the lower number first among equals."""
        return tuple(sorted(range(len(self.scores)), key=lambda expert: (-self.scores[expert], expert)))

    def share_of(self, share: float) -> int:
        """A share of its experts, up to a whole one; rounding of `share` itself never adds one."""
        return math.ceil(share * len(self.scores) - 1e-9)

    def count_at(self, share: float) -> int:
        """Experts that stay at a share."""
        return max(self.fewest, self.share_of(share))


def plan_pruning(config: ModelConfig, scores: Scores, settings: PruningConfig) -> Plan:
    """Plan which experts leave: those of the lowest scores, until `settings`' budget is met.

    In a softmax that competing generations joined, the scores of (layer, kind, 0) may run on over their experts, as
    usage is measured. Budget global compares scores over banks, each divided by its bank's mean but for criteria
    ablation and random. The most experts that a target allows stay, in the order of rank. Raises InputError where the
    budget is too small for what tokens choose, a generation is unknown, or scores are missing or not finite.
    """
    weight = {"parameters": 1.0, "megabytes": 1 / PARAMETERS_PER_MEGABYTE}.get(settings.unit)
    banks = [
        _Bank(
            key,
            _scores_of(config, key, scores),
            fewest_experts(config, key),
            1.0 if weight is None else weight * expert_parameters(config, key),
        )
        for key in chosen_banks(config, settings)
    ]
    counts = (_even_counts if settings.budget == "per_layer" else _ranked_counts)(banks, settings)
    cuts = tuple(
        BankCut(*bank.key, kept=tuple(sorted(bank.ranked[:count])), of=len(bank.scores))
        for bank, count in zip(banks, counts, strict=True)
        if count < len(bank.scores)
    )
    return Plan(config, (PruneExperts(cuts),), with_experts(config, {cut.key: len(cut.kept) for cut in cuts}))


def chosen_banks(config: ModelConfig, settings: PruningConfig) -> tuple[BankKey, ...]:
    """The banks that `settings` lets lose experts. Raises InputError where there is none, or no such generation."""
    if config.architecture == "dense":
        raise InputError("a dense model has no experts to remove", "architecture=dense", "prune a ModuleFormer")
    names = ["base", *(generation.name for generation in config.generations)]
    asked = (settings.generations,) if isinstance(settings.generations, str) else settings.generations
    unknown = sorted(set(asked) - {"all", *names})
    if unknown:
        raise InputError(f"no generation '{unknown[0]}'", "pruning.generations", f"known: all, {', '.join(names)}")
    numbers = {number for number, name in enumerate(names) if name in asked or "all" in asked}
    kinds = KINDS if settings.kinds == "both" else (settings.kinds,)
    keys = tuple(key for key in bank_keys(config) if key[1] in kinds and key[2] in numbers)
    if not keys:
        raise InputError(f"no {settings.kinds} experts in {', '.join(asked)}", "pruning", "choose other banks to prune")
    return keys


def fewest_kept(config: ModelConfig, settings: PruningConfig) -> tuple[int, int]:
    """Of the banks that may lose experts: how many experts must stay, and how many there are."""
    keys = chosen_banks(config, settings)
    return sum(fewest_experts(config, key) for key in keys), sum(num_experts(config, key) for key in keys)


def random_scores(config: ModelConfig, seed: int) -> dict[BankKey, list[float]]:
    """A number between 0 and 1 for every expert, a pure function of the counts of experts and `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(num_experts(config, key), generator=generator, dtype=torch.float64).tolist()
        for key in bank_keys(config)
    }


def _scores_of(config: ModelConfig, key: BankKey, scores: Scores) -> tuple[float, ...]:
    """One bank's scores, checked; cut out of the whole softmax's where it is those that are given."""
    sharing, found = softmax_banks(config, key), scores.get(key)
    sizes = [num_experts(config, each) for each in sharing]
    joint = scores.get(sharing[0])
    if joint is not None and len(joint) == sum(sizes):
        first = sum(sizes[: sharing.index(key)])
        found = joint[first : first + num_experts(config, key)]
    if found is None:
        fix = "measure on text that reaches these experts, or leave them out with pruning.generations"
        raise InputError("no scores for a bank", shown(config, key), fix)
    if len(found) != num_experts(config, key):
        raise InputError(f"{len(found)} scores", shown(config, key), f"it has {num_experts(config, key)} experts")
    if not all(math.isfinite(score) for score in found):
        raise InputError("a score is not finite", shown(config, key), "measure again; only numbers can be ranked")
    return tuple(found)


def _even_counts(banks: Sequence[_Bank], settings: PruningConfig) -> list[int]:
    """The same share of every bank, up to whole experts and to what a token chooses."""
    if settings.target is None:
        if all(bank.share_of(settings.keep) < bank.fewest for bank in banks):
            raise _too_small(settings, min(bank.fewest / len(bank.scores) for bank in banks))
        return [bank.count_at(settings.keep) for bank in banks]
    shares = {count / len(bank.scores) for bank in banks for count in range(bank.fewest, len(bank.scores) + 1)}
    for share in sorted(shares, reverse=True):
        counts = [bank.count_at(share) for bank in banks]
        if _fits(sum(count * bank.weight for count, bank in zip(counts, banks, strict=True)), settings.target):
            return counts
    raise _too_small(settings, sum(bank.fewest * bank.weight for bank in banks))


def _ranked_counts(banks: Sequence[_Bank], settings: PruningConfig) -> list[int]:
    """What every bank needs, then the best of all others as long as they fit."""
    total = sum(len(bank.scores) for bank in banks)
    counts = [bank.fewest for bank in banks]
    used = sum(bank.fewest * bank.weight for bank in banks)
    budget = settings.target if settings.target is not None else math.ceil(settings.keep * total - 1e-9)
    if not _fits(used, budget):
        raise _too_small(settings, used if settings.target is not None else used / total)
    waiting = [
        (-_normalised(bank, settings)[expert], number, expert)
        for number, bank in enumerate(banks)
        for expert in bank.ranked[bank.fewest :]
    ]
    for _, number, _ in sorted(waiting):
        used += banks[number].weight
        if not _fits(used, budget):
            break
        counts[number] += 1
    return counts


def _normalised(bank: _Bank, settings: PruningConfig) -> tuple[float, ...]:
    mean = math.fsum(bank.scores) / len(bank.scores)
    if settings.criterion in COMPARABLE or mean <= 0:
        return bank.scores
    return tuple(score / mean for score in bank.scores)


def _fits(weight: float, budget: float) -> bool:
    return weight <= budget * (1 + 1e-12)


def _too_small(settings: PruningConfig, smallest: float) -> InputError:
    """What was asked for would leave banks with fewer experts than a token chooses."""
    fix = "a bank keeps at least as many experts as a token chooses: the least possible here is"
    if settings.target is None:
        return InputError(f"pruning.keep={settings.keep}", "pruning", f"{fix} {math.ceil(smallest * 1e4) / 1e4:g}")
    least = f"{math.ceil(smallest)}" if settings.unit == "parameters" else f"{math.ceil(smallest * 1e3) / 1e3:g}"
    return InputError(f"pruning.target={settings.target:g}", "pruning", f"{fix} {least} {settings.unit}")


@dataclass(frozen=True, eq=False)
class RemovedExperts:
    """What left a model: `tensors` holds the removed rows of every parameter by its name, on the CPU.

    `before` is the config that it had. `to_parts` gives what a folder can hold, `from_parts` takes it back.
    """

    before: ModelConfig
    cuts: tuple[BankCut, ...]
    tensors: Mapping[str, Tensor]

    @property
    def after(self) -> ModelConfig:
        """The config of what is left."""
        return with_experts(self.before, {cut.key: len(cut.kept) for cut in self.cuts})

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors for a safetensors file, and plain JSON facts that say where they go."""
        cuts = [{**asdict(cut), "kept": list(cut.kept)} for cut in self.cuts]
        return dict(self.tensors), {"before": to_mapping(self.before), "cuts": cuts}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> RemovedExperts:
        """What `to_parts` gave. Raises InputError where the facts are not such."""
        read = from_mapping(_Facts, facts, "removed experts")
        keys = bank_keys(read.before)
        for cut in read.cuts:
            known = cut.key in keys and cut.of == num_experts(read.before, cut.key)
            enough = known and len(cut.kept) >= fewest_experts(read.before, cut.key)
            if not enough or not set(cut.kept) < set(range(cut.of)) or list(cut.kept) != sorted(set(cut.kept)):
                raise InputError("removed experts of no bank", str(cut.key), "the file belongs to another model")
        return cls(read.before, read.cuts, tensors)


@dataclass(frozen=True)
class _Facts:
    before: ModelConfig
    cuts: tuple[BankCut, ...]


def apply_pruning(model: ModuleFormer, plan: Plan) -> RemovedExperts:
    """Carry out a plan of `plan_pruning` in place, and return what left.

    Parameters keep their names but are new ones: begin a new optimizer and a new cache. Raises InputError where the
    plan was made for another model.
    """
    require_fit(model, plan)
    cuts = pruning_cuts(plan)
    tensors = {
        name: parameter.detach()[list(cut.removed)].cpu()
        for cut in cuts
        for name, parameter in bank_parameters(model, cut.key).items()
    }
    apply_plan(model, plan)
    return RemovedExperts(plan.before, cuts, tensors)


def pruning_cuts(plan: Plan) -> tuple[BankCut, ...]:
    """Every cut of a plan, in order."""
    return tuple(cut for each in plan.operations if isinstance(each, PruneExperts) for cut in each.cuts)


@torch.no_grad()
def restore_experts(model: ModuleFormer, removed: RemovedExperts) -> None:
    """Put every removed expert back in its place, in place: the same bits, and the config from before.

    Generations grown since stay. Raises InputError where the model is not what the pruning left, or they are back.
    """
    grown = len(removed.before.generations)
    newer = model.config.generations[grown:]
    fix = "they left a model of another shape, or are back already"
    if replace(model.config, generations=model.config.generations[:grown]) != removed.after:
        raise InputError("the removed experts do not fit the model", "restore", fix)
    whole: dict[str, Tensor] = {}
    for cut in removed.cuts:
        for name, parameter in bank_parameters(model, cut.key).items():
            rows = removed.tensors.get(name)
            if rows is None or rows.shape != (len(cut.removed), *parameter.shape[1:]):
                raise InputError(f"the removed experts do not fit the model: {name}", "restore", fix)
            own = [*cut.kept, *range(cut.of, cut.of + parameter.shape[0] - len(cut.kept))]
            value = parameter.new_empty(len(own) + len(rows), *parameter.shape[1:])
            value[own], value[list(cut.removed)] = parameter, rows.to(parameter)
            whole[name] = value
    for name, value in whole.items():
        put_parameter(model, name, value)
    set_config(model, replace(removed.before, generations=(*removed.before.generations, *newer)))
