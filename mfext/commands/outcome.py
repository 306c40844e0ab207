"""From a run's raw ledger and commits to its stable JSON, and to a report written beside them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mfext import __version__
from mfext.commands.measuring import WITHIN
from mfext.commands.proofs import read_proof
from mfext.commands.run_metrics import run_metrics
from mfext.commands.setting import records_of
from mfext.config import ModelConfig, Recipe
from mfext.conversion import from_mapping, to_mapping
from mfext.errors import InputError
from mfext.growth.plan import count_parameters
from mfext.metrics.bootstrap import Interval, PairedDocuments, mean_interval, pair_rows, paired_interval
from mfext.metrics.ledger import Ledger, LedgerRow
from mfext.metrics.transfer_matrix import TransferMatrix
from mfext.report import sections
from mfext.report.as_json import to_json
from mfext.report.extras import Extras, extras_of
from mfext.report.html import to_html
from mfext.report.markdown import to_markdown
from mfext.report.report import Report
from mfext.store import FORMAT_KEYS, MODEL_TYPE, Run, Stage, read_json_object

RANDOM_STAGE = "random"
"""What course.py calls stage 0 where it is the weights that pretraining started from."""
MENDED = ("prune", "healed")
"""Verb and stage that train a model again on what pruning took from it: no lesson, where the domain was known."""


def verb_of(opened: Run) -> str:
    """The verb that began a run: pretrain, grow or continual."""
    return str(opened.metadata.get("verb", "grow"))


def measured_stages(opened: Run) -> list[Stage]:
    """The run's committed stages as far as the ledger has them; InputError where it has none."""
    num_stages = _main_ledger(opened).num_stages
    stages = [stage for stage in opened.stages() if stage.index < num_stages]
    if not stages:
        fix = f"continue the run with mfext {verb_of(opened)} --resume {opened.path}"
        raise InputError("no stage of this run is measured yet", opened.path, fix)
    return stages


def _main_ledger(opened: Run) -> Ledger:
    """The rows measured at the ends of stages."""
    return Ledger(tuple(row for row in Ledger.from_json(opened.read_ledger()) if row.split != WITHIN))


def run_data(opened: Run, recipe: Recipe, verb: str) -> dict[str, object]:
    """The stable JSON of a pretrain, grow or continual run (cli contract), from its ledger and commits alone.

    Losses and changes are in nats per byte. Raises InputError where no stage is measured.
    """
    stages, ledger = measured_stages(opened), _main_ledger(opened)
    last, base_domains = stages[-1], [each.name for each in records_of(stages[0].manifest.metadata)]
    rehearsing = [stage.name for stage in stages[1:] if recipe.method == "joint" or (verb, stage.name) == MENDED]
    learned = _learned_stages(stages, base_domains, rehearsing)
    bystanders = list(dict.fromkeys(row.domain for row in ledger if row.domain not in (*base_domains, *learned)))
    measured_base = [name for name in base_domains if ledger.at(0, name, recipe.evaluation.split) is not None]
    matrix = TransferMatrix.from_ledger(ledger, measured_base, learned, bystanders, recipe.evaluation.split)
    facts = _facts(last)
    proof = read_proof(opened)
    return {
        "run": str(opened.path),
        "model": str(last.folder),
        "report": str(opened.path / "report.html"),
        "finished": len(stages) == _num_stages(recipe, verb) and None not in matrix.nll_per_byte[-1],
        "method": "pretrain" if verb == "pretrain" else recipe.method,
        "mode": recipe.growth.mode if verb != "pretrain" and recipe.method == "grow" else None,
        "domains": list(matrix.domains),
        "stages": [_stage_entry(stage) for stage in stages],
        "learned_in": {name: matrix.learned_stage[name] for name in matrix.domains},
        "matrix": {"nll_per_byte": [list(row) for row in matrix.nll_per_byte], "split": recipe.evaluation.split},
        "forgetting": _changes(ledger, matrix, matrix.old_domains() if len(stages) > 1 else (), recipe),
        "bystanders": _changes(ledger, matrix, bystanders if len(stages) > 1 else (), recipe),
        "learned": _learned(ledger, matrix, learned, recipe),
        "metrics": run_metrics(opened, matrix, stage_config(last).generations, learned),
        "params": _parameters(last, facts),
        "frozen_ok": proof.get("frozen_ok"),
        "frozen_tensors": proof.get("frozen_tensors"),
        "detach_equals_base": proof.get("detach_equals_base"),
        "identity_at_growth": facts.get("identity_at_growth"),
        "gate": facts.get("gate"),
        "within": _within(opened, stages),
        "borders": _borders(opened, stages),
        **_spent(stages),
    }


def _num_stages(recipe: Recipe, verb: str) -> int:
    """Stages of a finished run, the base's included."""
    if verb == "prune":
        return 2 + (recipe.method != "frozen") + (recipe.pruning.heal_tokens > 0)
    if verb != "continual":
        return 1 if verb == "pretrain" else 2
    start = 0 if recipe.base is not None else 1
    return start + 1 + (1 if recipe.method == "joint" else len(recipe.domains) - start)


def _learned_stages(
    stages: Sequence[Stage], base_domains: Sequence[str], rehearsing: Sequence[str]
) -> dict[str, list[int]]:
    """The stages that learned each domain, in order. What a stage of `rehearsing` meets again stays where it was."""
    learned: dict[str, list[int]] = {}
    for stage in stages[1:]:
        named = _lineage_entry(stage).get("domains")
        for name in named if isinstance(named, list) else ():
            if stage.name not in rehearsing or name not in (*base_domains, *learned):
                learned.setdefault(str(name), []).append(stage.index)
    return learned


def _facts(stage: Stage) -> Mapping[str, object]:
    """What was noted when a stage was learned; nothing for a base."""
    facts = stage.manifest.metadata.get("facts")
    return facts if isinstance(facts, dict) else {}


def _spent(stages: Sequence[Stage]) -> dict[str, object]:
    """Tokens, seconds and dropped windows of all stages this run learned together."""
    facts = [each for each in map(_facts, stages[1:]) if each]

    def total(key: str) -> float:
        numbers = [each.get(key, 0) for each in facts]
        return sum(number for number in numbers if isinstance(number, int | float))

    tokens, wall_s = total("tokens"), total("wall_s")
    rate = tokens / wall_s if wall_s else None
    spent = {"tokens": tokens, "wall_s": wall_s, "tokens_per_s": rate} if facts else {}
    none = {"tokens": None, "wall_s": None, "tokens_per_s": None}
    return {"skipped_windows": total("skipped_windows"), **none, **spent}


def _within(opened: Run, stages: Sequence[Stage]) -> dict[str, list[list[float]]]:
    """Losses measured inside stages, per domain: [optimizer steps since the base, nats per byte]."""
    starts = dict(zip((stage.index for stage in stages[1:]), _borders(opened, stages), strict=True))
    curves: dict[str, list[list[float]]] = {}
    for row in sorted(_within_rows(opened), key=lambda row: (row.stage, row.step)):
        if row.nats_per_byte is not None:
            curves.setdefault(row.domain, []).append([starts.get(row.stage, 0) + row.step, row.nats_per_byte])
    return curves


def _borders(opened: Run, stages: Sequence[Stage]) -> list[int]:
    """For every stage after row 0 the optimizer step, counted since the base, at which it began."""
    rows, borders, at = _within_rows(opened), [], 0
    for stage in stages[1:]:
        borders.append(at)
        at += max((row.step for row in rows if row.stage == stage.index), default=0)
    return borders


def _within_rows(opened: Run) -> list[LedgerRow]:
    return [row for row in Ledger.from_json(opened.read_ledger()) if row.split == WITHIN]


def run_report(opened: Run, verb: str, recipe: Recipe) -> Report:
    """The report of a run, from what is stored in it."""
    data = run_data(opened, recipe, verb)
    return sections.run_report(verb, data, run_extras(data, opened, recipe))


def run_extras(data: Mapping[str, object], opened: Run, recipe: Recipe) -> Extras:
    """What a report shows beside the stable JSON, checked."""
    return extras_of(data, _raw(opened, recipe))


def _raw(opened: Run, recipe: Recipe) -> dict[str, object]:
    """What a report shows beside the stable JSON: curves, usage, lineage, environment (plain JSON)."""
    stages = measured_stages(opened)
    return {
        "curves": {stage.name: _curve(opened.log_folder / f"{stage.index:03d}-{stage.name}") for stage in stages},
        "details": {stage.name: _read(opened.path / f"details-{stage.index:03d}.json") for stage in stages},
        "generations": [to_mapping(each) for each in stage_config(stages[-1]).generations],
        "lineage": stages[-1].manifest.metadata.get("lineage", []),
        "environment": dict(stages[-1].manifest.environment),
        "facts": {
            row.domain: _measured(row)
            for row in Ledger.from_json(opened.read_ledger())
            if row.split == recipe.evaluation.split
        },
    }


def write_reports(opened: Run, report: Report, seed: int, config_hash: str) -> Report:
    """Write report.html, report.md and metrics.json into the run; the report itself."""
    data = {"mfext_version": __version__, "seed": seed, "config_hash": config_hash, **report.data}
    complete = replace(report, data=data)
    opened.write_report_file("report.html", to_html(complete))
    opened.write_report_file("report.md", to_markdown(complete))
    opened.write_report_file("metrics.json", to_json(complete) + "\n")
    return complete


def _measured(row: LedgerRow) -> dict[str, object]:
    kept = ("split", "documents", "bytes", "tokens", "split_sha256")
    return {key: getattr(row, key) for key in kept}


def _changes(ledger: Ledger, matrix: TransferMatrix, domains: Sequence[str], recipe: Recipe) -> dict[str, object]:
    """Last stage minus the one that learned the domain (the base, for its own and for bystanders), with intervals.

    Where row 0 is random weights the base is row 1: against random weights nothing is ever forgotten.
    """
    settings = recipe.evaluation
    base = 1 if matrix.stage_names[0] == RANDOM_STAGE and matrix.last > 0 else 0
    since = {name: matrix.learned_stage[name] for name in domains}
    pairs = [_pair(ledger, name, (base if at is None else at, matrix.last), recipe) for name, at in since.items()]
    entries = {name: _change(pair, recipe) for name, pair in zip(domains, pairs, strict=True)}
    measured = [pair for pair in pairs if pair is not None]
    if not measured:
        return {"domains": entries, "mean": _entry(Interval(None, None, None, "no domain to compare"))}
    mean = mean_interval(measured, samples=settings.bootstrap_samples, seed=recipe.seed)
    return {"domains": entries, "mean": _entry(mean)}


def _learned(ledger: Ledger, matrix: TransferMatrix, learned: Iterable[str], recipe: Recipe) -> dict[str, object]:
    """Per domain its loss before and after the stage that learned it last, and the difference with its interval."""
    entries: dict[str, object] = {}
    for name in learned:
        stage = matrix.stage_of(name)
        change = _change(_pair(ledger, name, (stage - 1, stage), recipe), recipe)
        entries[name] = {"before": matrix.at(stage - 1, name), "after": matrix.at(stage, name), **change}
    return entries


def _pair(ledger: Ledger, domain: str, stages: tuple[int, int], recipe: Recipe) -> PairedDocuments | None:
    before, after = (ledger.at(stage, domain, recipe.evaluation.split) for stage in stages)
    return None if before is None or after is None else pair_rows(before, after)


def _change(pair: PairedDocuments | None, recipe: Recipe) -> dict[str, object]:
    if pair is None:
        return _entry(Interval(None, None, None, "not measured in both stages"))
    samples = recipe.evaluation.bootstrap_samples
    return _entry(paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=samples, seed=recipe.seed))


def _entry(interval: Interval) -> dict[str, object]:
    entry: dict[str, object] = {"difference": interval.difference, "low": interval.low, "high": interval.high}
    return entry if interval.reason is None else {**entry, "reason": interval.reason}


def _parameters(stage: Stage, facts: Mapping[str, object]) -> dict[str, object]:
    config = stage_config(stage)
    counts = count_parameters(config)
    added = counts.generations[-1] if facts.get("method") == "grow" else 0
    return {
        "total": counts.total,
        "trainable": facts.get("trainable", counts.total),
        "active_per_token": counts.active_per_token,
        "added": added,
    }


def stage_config(stage: Stage) -> ModelConfig:
    """The model config a committed stage holds."""
    mapping = read_json_object(stage.folder / "config.json")
    assert mapping.get("model_type") == MODEL_TYPE
    plain = {key: value for key, value in mapping.items() if key not in FORMAT_KEYS}
    return from_mapping(ModelConfig, plain, str(stage.folder / "config.json"))


def _lineage_entry(stage: Stage) -> Mapping[str, object]:
    """The last entry of a stage's lineage: the stage itself."""
    lineage = stage.manifest.metadata.get("lineage")
    entry = lineage[-1] if isinstance(lineage, list) and lineage else {}
    return entry if isinstance(entry, dict) else {}


def _stage_entry(stage: Stage) -> dict[str, object]:
    kept = ("method", "domains", "tokens", "wall_s", "tokens_per_s", "trainable", "peak_bytes")
    entry, counts = _lineage_entry(stage), count_parameters(stage_config(stage))
    shown = {key: entry[key] for key in kept if key in entry}
    sizes = {"total": counts.total, "active_per_token": counts.active_per_token}
    return {"name": stage.name, "index": stage.index, **shown, **sizes}


def _read(path: Path) -> dict[str, object]:
    return read_json_object(path) if path.is_file() else {}


def _curve(folder: Path) -> list[dict[str, float]]:
    """Rows of a stage's metrics.csv as numbers; empty cells left out."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
