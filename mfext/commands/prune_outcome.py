"""From a pruning run's ledger, curve and commits to its stable JSON and its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mfext.commands.measuring import WITHIN
from mfext.commands.outcome import run_data, run_extras, stage_config
from mfext.commands.pruning import PRUNED, read_curve
from mfext.config import Recipe
from mfext.errors import InputError
from mfext.growth.banks import total_experts
from mfext.growth.plan import count_parameters
from mfext.metrics.bootstrap import pair_rows, paired_interval
from mfext.metrics.ledger import Ledger, LedgerRow
from mfext.report.pruned import prune_sections
from mfext.report.report import Report
from mfext.report.sections import run_report
from mfext.store import Run, Stage, read_json_object

FOOTPRINT = "footprint.json"
"""What was pruned weighs, before and after: measured once, by the machine that pruned."""
PROVEN = ("masked_difference", "masked_difference_fp32", "equals_masked", "restores_exactly")


def prune_report(opened: Run, recipe: Recipe) -> Report:
    """The report of a pruning run, from what is stored in it. Raises InputError where nothing is pruned yet."""
    data = prune_data(opened, recipe)
    return prune_sections(run_report("prune", data, run_extras(data, opened, recipe)), data)


def prune_data(opened: Run, recipe: Recipe) -> dict[str, object]:
    """The stable JSON of a pruning run: that of every run, and the curve, what left, and before and after.

    Losses are in nats per byte; `increase` is against the model that was pruned, on the same documents.
    """
    pruned = next((stage for stage in opened.stages() if stage.name == PRUNED), None)
    if pruned is None:
        fix = f"continue the run with mfext prune --resume {opened.path}"
        raise InputError("nothing in this run is pruned yet", opened.path, fix)
    whole = next(stage for stage in opened.stages() if stage.index == pruned.index - 1)
    facts = pruned.manifest.metadata["facts"]
    assert isinstance(facts, dict)
    before, after = stage_config(whole), stage_config(pruned)
    total, kept = total_experts(before), total_experts(after)
    sizes = read_json_object(opened.path / FOOTPRINT) if (opened.path / FOOTPRINT).is_file() else {}
    return {
        **run_data(opened, recipe, "prune"),
        "target": facts["target"],
        "criterion": facts["criterion"],
        "curve": _curve(opened, whole, recipe),
        "cuts": facts["cuts"],
        "kept": kept,
        "removed": total - kept,
        "experts": total,
        "params_before": count_parameters(before).total,
        "params_after": count_parameters(after).total,
        "before": sizes.get("before"),
        "after": sizes.get("after"),
        **{key: facts.get(key) for key in PROVEN},
        **{key: facts[key] for key in ("dropped", "earlier_sha256", "equals_earlier") if "dropped" in facts},
    }


def _curve(opened: Run, whole: Stage, recipe: Recipe) -> list[dict[str, object]]:
    """The whole model first, then every point measured, with its rise on every domain and the interval of that."""
    rows = [row for row in Ledger.from_json(opened.read_ledger()) if row.stage == whole.index and row.split != WITHIN]
    full = {row.domain: row for row in rows}
    params = count_parameters(stage_config(whole)).total
    losses = {name: row.nats_per_byte for name, row in full.items()}
    first: dict[str, object] = {
        "criterion": None,
        "keep": 1.0,
        "params": params,
        "nll_per_byte": losses,
        "increase": {},
    }
    return [first, *(_point(point, full, recipe) for point in read_curve(opened))]


def _point(point: Mapping[str, object], full: Mapping[str, LedgerRow], recipe: Recipe) -> dict[str, object]:
    kept = ("criterion", "keep", "dropped", "params", "tokens_per_s", "reason")
    shown = {key: point[key] for key in kept if key in point}
    raw = point["rows"]
    rows = Ledger.from_json(raw if isinstance(raw, Sequence) else ())
    losses = {row.domain: row.nats_per_byte for row in rows}
    return {
        **shown,
        "nll_per_byte": losses,
        "increase": {row.domain: _rise(full[row.domain], row, recipe) for row in rows},
    }


def _rise(whole: LedgerRow, row: LedgerRow, recipe: Recipe) -> dict[str, object]:
    """How much worse than the whole model, in nats per byte with its interval, and as a share of its loss."""
    pair = pair_rows(whole, row)
    samples = recipe.evaluation.bootstrap_samples
    found = paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=samples, seed=recipe.seed)
    loss = whole.nats_per_byte
    share = found.difference / loss if loss and found.difference is not None else None
    entry: dict[str, object] = {"difference": found.difference, "low": found.low, "high": found.high, "share": share}
    return entry if found.reason is None else {**entry, "reason": found.reason}
