"""What `grow` and `continual` would do, for --dry-run: every stage, what trains in it, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence

from mfext.config import ModelConfig, Recipe
from mfext.growth.plan import Plan, count_parameters, gate_parameters, plan_expansion, plan_growth
from mfext.model.build import new_model
from mfext.model.shapes import shapes_alone
from mfext.report.planning import plan_report
from mfext.report.report import Report
from mfext.training.methods.lora import add_adapters
from mfext.training.methods.method import declared

BYTES = 4


def planned(verb: str, recipe: Recipe, config: ModelConfig, names: Sequence[str]) -> Report:
    """The dry run of one stage a name, from a base of `config`. Raises InputError where a stage could not work."""
    training = recipe.training
    stages: list[dict[str, object]] = []
    operations: list[dict[str, object]] = []
    trainable, last = 0, config
    for name in ["joint"] if recipe.method == "joint" else names:
        plan = _plan(recipe, last, name)
        after = last if plan is None else plan.after
        trained = _trainable(recipe, last, after)
        stages.append({"name": name, "trains": declared(recipe.method), "trainable": trained})
        operations += [] if plan is None else plan.operations_json()
        trainable, last = max(trainable, trained), after
    first, counts = count_parameters(config), count_parameters(last)
    steps = 0 if recipe.method == "frozen" else training.steps * len(names)
    data: dict[str, object] = {
        "dry_run": True,
        "method": recipe.method,
        "stages": stages,
        "plan": {"operations": operations},
        "params": {
            "total": counts.total,
            "trainable": trainable,
            "frozen": counts.total - trainable,
            "added": counts.total - first.total,
            "active_per_token": counts.active_per_token,
        },
        "steps": steps,
        "tokens": steps * training.batch_size * training.sequence_length,
        "memory_bytes": BYTES * (counts.total + 3 * trainable),
        "disk_bytes": BYTES * (first.total + counts.total * len(stages) + 6 * trainable),
    }
    return plan_report(verb, data)


def _plan(recipe: Recipe, config: ModelConfig, name: str) -> Plan | None:
    if recipe.method == "grow":
        return plan_growth(config, recipe.growth, name)
    return plan_expansion(config, recipe.expand.blocks) if recipe.method == "expand" else None


def _trainable(recipe: Recipe, before: ModelConfig, after: ModelConfig) -> int:
    """Parameters one stage trains; a domain gate is taught apart and counts as frozen."""
    total = count_parameters(after).total
    if recipe.method == "frozen":
        return 0
    if recipe.method == "grow":
        return total - count_parameters(before).total - gate_parameters(after)
    if recipe.method == "expand":
        return total - count_parameters(before).total
    if recipe.method == "lora":
        with shapes_alone():
            model = new_model(before).requires_grad_(False)
            add_adapters(model, recipe.lora, recipe.seed)
        return sum(each.numel() for each in model.parameters()) - total
    return total
