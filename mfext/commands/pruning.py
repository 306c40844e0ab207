"""What `prune` does to a model: scores, the curve of what is kept against loss, and the smaller model committed.

Every point of the curve is a model made physically smaller and measured; it is kept in the run's curve.json as soon as
it is known, so that an interrupted run goes on behind it. Experts are chosen on train text and measured on other text.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mfext import __version__
from mfext.commands.growing import new_windows
from mfext.commands.measuring import Column, Moment, measure
from mfext.commands.models import OpenedModel, model_tensors
from mfext.commands.preparing import Work, text_of
from mfext.commands.setting import lineage_with, records_of
from mfext.commands.usage import usage_of
from mfext.config import ModelConfig, Recipe
from mfext.config_pruning import PruningConfig, PruningCriterion
from mfext.conversion import to_mapping
from mfext.domains.domain import Domain
from mfext.errors import InputError
from mfext.growth.banks import bank_keys, num_experts, softmax_banks, total_experts
from mfext.growth.growable import growable
from mfext.growth.masking import MOST_DIFFERENCE, ablation_scores, prove_pruning
from mfext.growth.plan import Plan, count_parameters
from mfext.growth.probes import Windows
from mfext.growth.pruning import (
    Scores,
    apply_pruning,
    fewest_kept,
    plan_pruning,
    pruning_cuts,
    random_scores,
    restore_experts,
)
from mfext.metrics.ledger import LedgerRow
from mfext.metrics.usage import scores as usage_scores
from mfext.model.moduleformer import ModuleFormer
from mfext.report.quantities import percent, plural
from mfext.report.terminal import Console
from mfext.store import Run, Stage, model_hash, read_json_object, save_model

CURVE = "curve.json"
REMOVED = "removed"
"""The folder in a run that holds the experts removed, so that they can be put back."""
PRUNED, HEALED = "pruned", "healed"
PROBED = 8


@dataclass(frozen=True)
class Cutting:
    """One model to prune: the stage it is, the domain it is pruned for, and what it is measured on."""

    work: Work
    origin: Stage
    target: Domain
    columns: Sequence[Column]

    @property
    def recipe(self) -> Recipe:
        return self.work.recipe

    @property
    def opened(self) -> Run:
        return self.work.opened

    @property
    def console(self) -> Console:
        return self.work.console

    def windows(self, count: int) -> Windows:
        """Train windows of the target, the first of the stage's own order."""
        return new_windows(text_of(self.work, (self.target,)), count)


def scores_of(cutting: Cutting, criterion: PruningCriterion, full: OpenedModel) -> Scores:
    """What every expert is worth on the target's train text; a bank that no token of it reaches is worth nothing."""
    model, settings = growable(full.model), cutting.recipe.pruning
    if criterion == "random":
        return random_scores(model.config, cutting.recipe.seed)
    if criterion == "ablation":
        cutting.console.say(f"ablation: the loss without each of {total_experts(model.config)} experts alone")
        return ablation_scores(model, cutting.windows(settings.ablation_windows))
    recipe, target = cutting.recipe, cutting.target
    sample = replace(recipe.evaluation, max_bytes=settings.sample_bytes)
    usage = usage_of(full, (target,), sample, cutting.console, recipe.tokenizer, "train")[target.name]
    config = model.config
    unreached = {
        key: [0.0] * num_experts(config, key) for key in bank_keys(config) if softmax_banks(config, key)[0] == key
    }
    return {**unreached, **usage_scores(usage, criterion)}


def draw_curve(cutting: Cutting, full: OpenedModel) -> Scores | None:
    """Every criterion at every share kept: smaller models, measured on every column. What curve.json holds stays.

    Returns the scores of the criterion that chooses for good, where the curve needed them.
    """
    settings, points = cutting.recipe.pruning, read_curve(cutting.opened)
    done = {(point["criterion"], point["keep"]) for point in points}
    chosen: Scores | None = None
    for criterion in settings.curve_criteria:
        wanted = [keep for keep in settings.curve if (criterion, keep) not in done]
        scores = scores_of(cutting, criterion, full) if wanted else {}
        chosen = scores if wanted and criterion == settings.criterion else chosen
        for keep in wanted:
            points = [*points, _point(cutting, full, replace(settings, criterion=criterion, keep=keep), scores)]
            cutting.opened.write_report_file(CURVE, json.dumps({"points": points}))
    return chosen


def read_curve(opened: Run) -> list[dict[str, object]]:
    """The points measured so far, in the order they were."""
    path = opened.path / CURVE
    points = read_json_object(path)["points"] if path.is_file() else []
    return points if isinstance(points, list) else []


def _point(cutting: Cutting, full: OpenedModel, settings: PruningConfig, scores: Scores) -> dict[str, object]:
    point: dict[str, object] = {"criterion": settings.criterion, "keep": settings.keep}
    model = growable(full.model)
    shared = replace(settings, unit="share", target=None, max_loss_increase=None)
    try:
        plan_by_lot(model.config, shared, cutting.recipe.seed)
    except InputError as error:  # too few for what tokens choose, whoever is kept: said in the report
        return {**point, "reason": str(error), "rows": []}
    plan = plan_pruning(model.config, scores, shared)
    smaller = copy.deepcopy(model)
    apply_pruning(smaller, plan)
    said = f"{settings.criterion}: {percent(settings.keep, 1)} kept"
    return change_point(cutting, smaller, {**point, "cuts": cuts_json(plan)}, said)


def change_point(cutting: Cutting, smaller: ModuleFormer, point: Mapping[str, object], said: str) -> dict[str, object]:
    """A point of the curve: what `point` says of the smaller model, its size, speed and ledger rows."""
    begun = time.process_time()
    rows = measure_columns(cutting, smaller, cutting.columns)
    spent_s = time.process_time() - begun
    cutting.console.say(f"{said}, {_losses(rows, cutting.target.name)}")
    return {
        **point,
        "params": count_parameters(smaller.config).total,
        "tokens_per_s": sum(row.tokens for row in rows) / max(spent_s, 1e-9),
        "rows": [row.to_json() for row in rows],
    }


def plan_by_lot(config: ModelConfig, settings: PruningConfig, seed: int) -> Plan:
    """The plan where lots decide who leaves: as many as any criterion would remove. Raises what the real one would."""
    settings = replace(settings, criterion="random")
    if settings.max_loss_increase is not None:
        settings = replace(settings, unit="share", target=None, keep=1.0)
    return plan_pruning(config, random_scores(config, seed), settings)


def measure_columns(cutting: Cutting, model: ModuleFormer, columns: Sequence[Column]) -> list[LedgerRow]:
    """Ledger rows of a model that is no stage."""
    moment = Moment(cutting.origin.index, "curve", 0, "", cutting.recipe.seed)
    return measure(model, columns, moment, cutting.recipe.evaluation, lambda line: None)[0]


def _losses(rows: Sequence[LedgerRow], target: str) -> str:
    """The target's loss, and the mean of all other domains'."""
    own = ", ".join(f"{row.domain} {row.bits_per_byte or 0:.3f}" for row in rows if row.domain == target)
    others = [row.bits_per_byte or 0.0 for row in rows if row.domain != target]
    mean = f", mean of {plural(len(others), 'other')} {sum(others) / len(others):.3f}" if others else ""
    return f"{own} bits per byte{mean}"


def cuts_json(plan: Plan) -> list[dict[str, object]]:
    """Every bank that loses experts: which stay, of how many."""
    return [
        {"layer": cut.layer, "kind": cut.kind, "generation": cut.generation, "kept": list(cut.kept), "of": cut.of}
        for cut in pruning_cuts(plan)
    ]


def choose_cuts(cutting: Cutting, full: OpenedModel, scores: Scores | None = None) -> Plan:
    """The plan asked for: by `keep` or `target`, or the fewest experts within `max_loss_increase` on the target.

    That search halves the span of counts, as if the loss rose with every expert that leaves. `scores` None measures
    them.
    """
    settings, model = cutting.recipe.pruning, growable(full.model)
    scores = scores_of(cutting, settings.criterion, full) if scores is None else scores
    if settings.max_loss_increase is None:
        return plan_pruning(model.config, scores, settings)
    own = [column for column in cutting.columns if column.domain == cutting.target.name]
    allowed = _loss(measure_columns(cutting, model, own)) * (1 + settings.max_loss_increase)
    fewest, total = fewest_kept(model.config, settings)
    settings = replace(settings, unit="share", target=None, keep=1.0)
    low, high, best = fewest, total, plan_pruning(model.config, scores, settings)
    while low < high:
        middle = (low + high) // 2
        plan = plan_pruning(model.config, scores, replace(settings, keep=middle / total))
        smaller = copy.deepcopy(model)
        apply_pruning(smaller, plan)
        loss = _loss(measure_columns(cutting, smaller, own))
        cutting.console.say(f"{middle} of {total} experts: {loss / allowed - 1:+.1%} of the loss allowed")
        if loss <= allowed:
            high, best = middle, plan
        else:
            low = middle + 1
    return best


def _loss(rows: Sequence[LedgerRow]) -> float:
    loss = rows[0].nats_per_byte
    assert loss is not None, "a column has text"
    return loss


def commit_pruned(cutting: Cutting, full: OpenedModel, plan: Plan, index: int) -> Stage:
    """Apply `plan` to a copy, prove it, and commit the smaller model; what left goes to the run's folder `removed`."""
    model = growable(full.model)
    smaller = copy.deepcopy(model)
    removed = apply_pruning(smaller, plan)
    again = copy.deepcopy(smaller)
    restore_experts(again, removed)
    facts = {"criterion": cutting.recipe.pruning.criterion, "cuts": cuts_json(plan)}
    domains = [each.to_json() for each in records_of(cutting.origin.manifest.metadata)]
    change = Change(plan, smaller, again, removed.to_parts(), prove_pruning, domains)
    return commit_change(cutting, full, change, facts, index)


Proof = Callable[[ModuleFormer, ModuleFormer, Plan, Tensor, Tensor], float]


@dataclass(frozen=True)
class Change:
    """What a plan made of a model: the smaller one, that one with everything put back, what left (tensors and facts),
    what shows that nothing else changed (the largest difference of a logit on ids and document starts), and the
    domains that the smaller one has learned."""

    plan: Plan
    smaller: ModuleFormer
    restored: ModuleFormer
    removed: tuple[dict[str, Tensor], dict[str, object]]
    prove: Proof
    domains: Sequence[Mapping[str, str]]


def commit_change(
    cutting: Cutting, full: OpenedModel, change: Change, facts: Mapping[str, object], index: int
) -> Stage:
    """Prove a change and commit the smaller model, what left beside it; `facts` go to its lineage."""
    model, before, smaller = growable(full.model), model_hash(model_tensors(full.model)), change.smaller
    probe = cutting.windows(PROBED)
    text = probe.input_ids, probe.document_starts
    # In float64: what is proven is that nothing else changed, not how float32 sums round at this size of logits.
    difference = change.prove(copy.deepcopy(model).double(), copy.deepcopy(smaller).double(), change.plan, *text)
    rounded = change.prove(model, smaller, change.plan, *text)
    tensors, restored = model_tensors(smaller), change.restored
    complete: dict[str, object] = {
        "method": "prune",
        "target": cutting.target.name,
        **facts,
        "masked_difference": difference,
        "masked_difference_fp32": rounded,
        "equals_masked": difference <= MOST_DIFFERENCE,
        "restores_exactly": model_hash(model_tensors(restored)) == before and restored.config == model.config,
    }
    out_tensors, out_facts = change.removed
    known = {key: value for key, value in cutting.origin.manifest.metadata.items() if key in ("domains", "lineage")}
    left = {**known, "removed": out_facts, "from_sha256": before, "pruned_sha256": model_hash(tensors)}
    save_model(out_tensors, to_mapping(change.plan.before), cutting.opened.path / REMOVED, left)
    metadata = _metadata(cutting, complete, change.domains, model_hash(tensors))
    return cutting.opened.commit_stage(index, PRUNED, tensors, to_mapping(smaller.config), {}, metadata)


def _metadata(
    cutting: Cutting, facts: Mapping[str, object], domains: Sequence[Mapping[str, str]], sha256: str
) -> dict[str, object]:
    before = cutting.origin.manifest.metadata
    entry = {"name": PRUNED, "domains": [], "sha256": sha256, **facts}
    return {
        **({"tokenizer": before["tokenizer"]} if "tokenizer" in before else {}),
        "domains": list(domains),
        "lineage": lineage_with(before, entry),
        "seed": cutting.recipe.seed,
        "mfext_version": __version__,
        "facts": dict(facts),
    }
