"""Every named metric of a run, from its matrix, its rows inside stages and its usage and gate details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mfext.commands.measuring import WITHIN
from mfext.config import GenerationConfig
from mfext.metrics.details import DomainDetails, read_details
from mfext.metrics.drift import measure_routing
from mfext.metrics.gates import GatedGeneration, GateMeasurements, measure_gates
from mfext.metrics.ledger import Ledger
from mfext.metrics.metric_value import MetricValue
from mfext.metrics.stability import WithinCurves, measure_stability
from mfext.metrics.transfer import measure
from mfext.metrics.transfer_matrix import TransferMatrix
from mfext.store import Run, read_json_object


def run_metrics(
    opened: Run, matrix: TransferMatrix, generations: Sequence[GenerationConfig], learned: Mapping[str, Sequence[int]]
) -> dict[str, object]:
    """Metric name -> its plain JSON. `generations` are the last stage's; `learned` all stages of each domain."""
    values = measure(matrix)
    ledger = Ledger.from_json(opened.read_ledger())
    values |= measure_stability(WithinCurves.from_ledger(ledger, matrix.learned_stage, WITHIN))
    details = [_details(opened, stage) for stage in range(matrix.last + 1)]
    old = matrix.old_domains()
    before = {name: found for name in old if (found := details[matrix.stage_of(name)].get(name)) is not None}
    values |= measure_routing(before, details[-1], old)
    first = {
        name: None if stage is None else matrix.first_stage_of(name) for name, stage in matrix.learned_stage.items()
    }
    values |= measure_gates(GateMeasurements(details[-1], _gated(generations, learned, matrix), first))
    return {name: value.to_json() for name, value in _ordered(values)}


def _ordered(values: Mapping[str, MetricValue]) -> list[tuple[str, MetricValue]]:
    """Defined metrics first, each half in the order it was measured in."""
    return sorted(values.items(), key=lambda item: item[1].value is None)


def _details(opened: Run, stage: int) -> dict[str, DomainDetails]:
    path = opened.path / f"details-{stage:03d}.json"
    return read_details(read_json_object(path), str(path)) if path.is_file() else {}


def _gated(
    generations: Sequence[GenerationConfig], learned: Mapping[str, Sequence[int]], matrix: TransferMatrix
) -> tuple[GatedGeneration, ...]:
    """The gated generations this run grew, numbered as gates are measured."""
    gated = [each.name for each in generations if each.mode == "gated"]
    stage_of = {name: index for index, name in enumerate(matrix.stage_names)}
    return tuple(
        GatedGeneration(number, name, _domains_of(stage_of[name], learned), stage_of[name])
        for number, name in enumerate(gated)
        if name in stage_of
    )


def _domains_of(stage: int, learned: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    return tuple(domain for domain, stages in learned.items() if stage in stages)
