"""A sweep's trials, those that differ only in their seed taken together: means over seeds with intervals.

Losses in nats per byte. `report/groups.py` reads what is made here; the statistics are those of metrics/seeds.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mfext.commands.prune_summary import pruning_of
from mfext.metrics.seeds import SeedInterval, mean_over_seeds, ratio_over_seeds
from mfext.report.reading import Json, domains, listed, mapping, matrix, objects, text
from mfext.report.reading import number as number_at
from mfext.report.setting_names import Shorts, setting_name, short_values
from mfext.report.since import learned_stages

DONE = "done"
# What others are compared with, where the sweep has it.
REFERENCES = ("replay", "full")
PARAMETERS = ("total", "trainable", "active_per_token", "added")
BySeed = dict[int, float | None]


@dataclass(frozen=True)
class Setting:
    """The trials of one setting. `runs`: seed -> stable JSON of the finished run."""

    name: str
    overrides: Mapping[str, object]
    trials: tuple[Json, ...]
    runs: Mapping[int, Json]

    @property
    def first(self) -> Json:
        """The finished run of the lowest seed; empty where there is none."""
        return self.runs[min(self.runs)] if self.runs else {}

    def by_seed(self, measure: Callable[[Json], float | None]) -> BySeed:
        """One number per finished seed."""
        return {seed: measure(run) for seed, run in self.runs.items()}


def with_groups(data: Json) -> dict[str, object]:
    """A sweep's data with `groups` (trials that differ only in `seed`, summed up) and `references` (their names)."""
    settings = settings_of(data)
    named = {setting.name: setting for setting in settings if setting.runs}
    references = {name: named[name] for name in REFERENCES if name in named}
    groups = [{**_group(setting, references), **_pruning(setting, settings)} for setting in settings]
    return {**data, "groups": groups, "references": list(references)}


def _pruning(setting: Setting, settings: Sequence[Setting]) -> dict[str, object]:
    """What its runs pruned, beside those that differ from them in the method alone: full fine-tuning."""
    beside = {**setting.overrides, "method": "full"}
    full = next((other.runs for other in settings if dict(other.overrides) == beside), {})
    return {"pruning": pruning} if (pruning := pruning_of(setting.runs, full)) else {}


def settings_of(data: Json) -> tuple[Setting, ...]:
    """The settings in the sweep's order; named by their method alone, else by every override that is no seed."""
    members: dict[str, list[Json]] = {}
    trials = objects(data, "trials")
    for trial in trials:
        members.setdefault(str(sorted(_varied(trial).items())), []).append(trial)
    shorts = short_values(map(_varied, trials))
    return tuple(_setting(_name(each[0], shorts, text(data, "verb")), each) for each in members.values())


def _varied(trial: Json) -> dict[str, object]:
    return {key: value for key, value in mapping(trial, "overrides").items() if key != "seed"}


def _name(trial: Json, shorts: Shorts, verb: str) -> str:
    return setting_name(_varied(trial), shorts) or text(trial, "data", "method") or verb


def _setting(name: str, trials: Sequence[Json]) -> Setting:
    runs = {}
    for place, trial in enumerate(trials):
        if text(trial, "state") == DONE:
            seed = number_at(trial, "overrides", "seed")
            seed = number_at(trial, "data", "seed") if seed is None else seed
            runs[place if seed is None else round(seed)] = mapping(trial, "data")
    return Setting(name, _varied(trials[0]), tuple(trials), runs)


def _group(setting: Setting, references: Mapping[str, Setting]) -> dict[str, object]:
    first = setting.first
    stage_of = learned_stages(first)
    every = dict.fromkeys(name for run in setting.runs.values() for name in mapping(run, "learned"))
    # By stage, then name: results that were written down and read again have lost the stream's order.
    names = sorted(every, key=lambda name: (stage_of.get(name) or 0, name))
    learned = {name: mean_over_seeds(setting.by_seed(_loss_after(name))).to_json() for name in names}
    return {
        "name": setting.name,
        "method": text(first, "method") or str(setting.overrides.get("method", "")),
        "overrides": dict(setting.overrides),
        "seeds": sorted(setting.runs),
        "num_done": len(setting.runs),
        "num_trials": len(setting.trials),
        "trials": [text(trial, "id") for trial in setting.trials],
        "domains": list(domains(first)),
        "stages": list(listed(first, "stages")),
        "matrix": {"nll_per_byte": _mean_matrix(list(setting.runs.values()))},
        "forgetting": {
            **_explained(mean_over_seeds(setting.by_seed(forgotten)), first, "forgetting"),
            "domains": {
                name: mean_over_seeds(setting.by_seed(_forgotten_of(name))).to_json()
                for name in mapping(first, "forgetting", "domains")
            },
        },
        "bystanders": _explained(mean_over_seeds(setting.by_seed(_hurt)), first, "bystanders"),
        "learned": {name: {**each, "stage": stage_of.get(name)} for name, each in learned.items()},
        "learned_mean": mean_over_seeds(setting.by_seed(_mean_loss_after)).to_json(),
        "forgetting_to": {
            name: ratio_over_seeds(setting.by_seed(forgotten), other.by_seed(forgotten)).to_json()
            for name, other in references.items()
            if name != setting.name
        },
        "learning_to": {
            name: {domain: _gap(setting, other, domain).to_json() for domain in names}
            for name, other in references.items()
            if name != setting.name
        },
        **_cost(setting),
        "within": dict(mapping(first, "within")),
        "borders": list(listed(first, "borders")),
    }


def forgotten(run: Json) -> float | None:
    """A run's mean forgetting: its old domains against the stages that learned them."""
    return number_at(run, "forgetting", "mean", "difference")


def _forgotten_of(domain: str) -> Callable[[Json], float | None]:
    return lambda run: number_at(run, "forgetting", "domains", domain, "difference")


def _hurt(run: Json) -> float | None:
    return number_at(run, "bystanders", "mean", "difference")


def _loss_after(domain: str) -> Callable[[Json], float | None]:
    return lambda run: number_at(run, "learned", domain, "after")


def _mean_loss_after(run: Json) -> float | None:
    losses = [number_at(run, "learned", name, "after") for name in mapping(run, "learned")]
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(losses) else None


def _gap(setting: Setting, other: Setting, domain: str) -> SeedInterval:
    """How much higher this setting's loss is than the reference's, as a share of the latter: 0.02 is 2 %."""
    ratio = ratio_over_seeds(setting.by_seed(_loss_after(domain)), other.by_seed(_loss_after(domain)))
    moved = [None if edge is None else edge - 1 for edge in (ratio.estimate, ratio.low, ratio.high)]
    return SeedInterval(moved[0], moved[1], moved[2], ratio.seeds, ratio.reason)


def _explained(interval: SeedInterval, run: Json, key: str) -> dict[str, object]:
    """The interval; where the run says why it has no such number, with that reason."""
    entry = interval.to_json()
    why = text(run, key, "mean", "reason")
    return {**entry, "reason": why} if interval.estimate is None and why else entry


def _mean_matrix(runs: Sequence[Json]) -> list[list[float | None]]:
    """Mean over runs, cell by cell; None where one of them was not measured. Empty where shapes differ."""
    matrices = [matrix(run) for run in runs]
    shapes = {tuple(map(len, rows)) for rows in matrices}
    if len(shapes) != 1 or len({domains(run) for run in runs}) != 1:
        return []
    return [[_mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _mean(cells: Sequence[float | None]) -> float | None:
    known = [cell for cell in cells if cell is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(cells) else None


def _cost(setting: Setting) -> dict[str, object]:
    """Parameters of the last stage, as they are in every seed; mean tokens and seconds of all stages trained."""
    runs = list(setting.runs.values())
    tokens = _mean([_spent(run, "tokens") for run in runs])
    wall_s = _mean([_spent(run, "wall_s") for run in runs])
    params = {key: number_at(setting.first, "params", key) for key in PARAMETERS}
    rate = tokens / wall_s if tokens is not None and wall_s else None
    return {"params": params, "tokens": tokens, "wall_s": wall_s, "tokens_per_s": rate}


def _spent(run: Json, key: str) -> float | None:
    """Sum over the stages that say; the run's own number where none does."""
    known = [value for stage in objects(run, "stages")[1:] if (value := number_at(stage, key)) is not None]
    return math.fsum(known) if known else number_at(run, key)
