"""What `prune --drop-generation` does to a model: generations leave whole, the newest first, measured and proven."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence

from mfext.commands.models import OpenedModel, model_tensors
from mfext.commands.pruning import (
    CURVE,
    Change,
    Cutting,
    change_point,
    commit_change,
    read_curve,
)
from mfext.commands.setting import records_of
from mfext.growth.banks import total_experts
from mfext.growth.growable import growable
from mfext.growth.masking import prove_removal
from mfext.growth.plan import Plan
from mfext.growth.removal import leave_last, plan_removal, remove_generations, removed_names, restore_generations
from mfext.report.reading import Json, listed, objects, text
from mfext.store import Stage, model_hash

WHOLE = "generation"
"""What stands for a criterion where generations leave whole."""


def draw_drops(cutting: Cutting, full: OpenedModel) -> None:
    """The curve: the newest generation leaves, then the next as well. What curve.json holds stays."""
    points, model = read_curve(cutting.opened), growable(full.model)
    leaving = removed_names(plan_removal(model.config, cutting.recipe.pruning.drop_generations))
    for count in range(len(points) + 1, len(leaving) + 1):
        plan = plan_removal(model.config, leaving[:count])
        smaller = copy.deepcopy(model)
        remove_generations(smaller, plan)
        point = {"criterion": WHOLE, "keep": share_kept(plan), "dropped": list(leaving[:count])}
        said = f"without {', '.join(leaving[:count])}"
        points = [*points, change_point(cutting, smaller, point, said)]
        cutting.opened.write_report_file(CURVE, json.dumps({"points": points}))


def share_kept(plan: Plan) -> float:
    """Experts left, as a share of those there were."""
    return total_experts(plan.after) / total_experts(plan.before)


def commit_dropped(cutting: Cutting, full: OpenedModel, index: int) -> Stage:
    """Remove the generations from a copy, prove it and commit the smaller model."""
    model = growable(full.model)
    plan = plan_removal(model.config, cutting.recipe.pruning.drop_generations)
    smaller = copy.deepcopy(model)
    removed = remove_generations(smaller, plan)
    again = copy.deepcopy(smaller)
    restore_generations(again, removed)
    names, metadata = removed_names(plan), cutting.origin.manifest.metadata
    earlier = sha256_before(objects(metadata, "lineage"), names) if leave_last(plan) else None
    facts: dict[str, object] = {
        "criterion": WHOLE,
        "cuts": [],
        "dropped": list(names),
        "earlier_sha256": earlier,
        "equals_earlier": None if earlier is None else model_hash(model_tensors(smaller)) == earlier,
    }
    change = Change(plan, smaller, again, removed.to_parts(), prove_removal, left_domains(metadata, names))
    return commit_change(cutting, full, change, facts, index)


def sha256_before(lineage: Sequence[Json], names: Sequence[str]) -> str | None:
    """The SHA-256 of the model that the first of the growths `names` began from; None where something else happened to
    the model since, or the lineage does not say."""
    last = list(lineage)
    while last and text(last[-1], "method") == "grow" and text(last[-1], "name") in names:
        last.pop()
    complete = len(lineage) - len(last) == len(names)
    return (text(last[-1], "sha256") or None) if complete and last else None


def left_domains(metadata: Mapping[str, object], names: Sequence[str]) -> list[dict[str, str]]:
    """What the model still has learned: all but the domains of which only those generations know."""
    lineage = objects(metadata, "lineage")
    newest = {name: place for place, each in enumerate(lineage) if (name := text(each, "name")) in names}
    gone = {str(each) for place in newest.values() for each in listed(lineage[place], "domains")}
    others = (each for place, each in enumerate(lineage) if place not in newest.values())
    gone -= {str(domain) for each in others for domain in listed(each, "domains")}
    return [each.to_json() for each in records_of(metadata) if each.name not in gone]
