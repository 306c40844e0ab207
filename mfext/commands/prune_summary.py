"""What several prunings that differ only in their seed say together: the curve, and what pruning and healing cost."""

from __future__ import annotations

from collections.abc import Mapping

from mfext.metrics.seeds import SeedInterval, mean_over_seeds, ratio_over_seeds
from mfext.report.reading import Json, domains, matrix, objects, stages, text
from mfext.report.reading import number as number_at

Runs = Mapping[int, Json]


def pruning_of(runs: Runs, full: Runs) -> dict[str, object]:
    """`curve`, and for each of the stages pruned and healed its loss on the target against the model pruned
    (`against_whole`) and, over the seeds both ran, against that of `full` (`against_full`); empty where none pruned.

    Shares: 0.01 is 1 % worse. `kept` is the share of the experts left, that and the counts means over seeds.
    """
    if not any("curve" in run for run in runs.values()):
        return {}
    costs = {}
    for name in ("pruned", "healed"):
        own = {seed: _loss(run, name) for seed, run in runs.items()}
        if any(loss is not None for loss in own.values()):
            costs[name] = {
                "against_whole": _above(own, {seed: _loss_before(run) for seed, run in runs.items()}).to_json(),
                "against_full": _above(own, {seed: _loss_before(run) for seed, run in full.items()}).to_json(),
            }
    first, counts = next(iter(runs.values())), ("kept", "experts", "params_before", "params_after")
    means = {key: mean_over_seeds({seed: number_at(run, key) for seed, run in runs.items()}).estimate for key in counts}
    kept = None if means["kept"] is None or not means["experts"] else means["kept"] / means["experts"]
    named = {key: text(first, key) for key in ("target", "criterion")}
    return {"curve": _curve(runs), "costs": costs, **named, **means, "kept": kept}


def _above(losses: Mapping[int, float | None], reference: Mapping[int, float | None]) -> SeedInterval:
    ratio = ratio_over_seeds(losses, reference)
    moved = [None if edge is None else edge - 1 for edge in (ratio.estimate, ratio.low, ratio.high)]
    return SeedInterval(moved[0], moved[1], moved[2], ratio.seeds, ratio.reason)


def _loss(run: Json, stage: str) -> float | None:
    """Loss on the target after a stage, nats per byte."""
    rows, names, columns = matrix(run), stages(run), domains(run)
    target = text(run, "target")
    if stage not in names or target not in columns or len(rows) != len(names):
        return None
    return rows[names.index(stage)][columns.index(target)]


def _loss_before(run: Json) -> float | None:
    """That of the model that was pruned."""
    names = stages(run)
    return _loss(run, names[names.index("pruned") - 1]) if "pruned" in names else None


def _curve(runs: Runs) -> list[dict[str, object]]:
    """Every criterion and share that some seed measured: the rise on the target over seeds."""
    every = dict.fromkeys(
        (text(point, "criterion"), number_at(point, "keep"))
        for run in runs.values()
        for point in objects(run, "curve")
        if text(point, "criterion")
    )
    return [
        {
            "criterion": criterion,
            "keep": keep,
            "rise": mean_over_seeds({seed: _rise(run, criterion, keep) for seed, run in runs.items()}).to_json(),
        }
        for criterion, keep in every
    ]


def _rise(run: Json, criterion: str, keep: float | None) -> float | None:
    found = [
        number_at(point, "increase", text(run, "target"), "share")
        for point in objects(run, "curve")
        if (text(point, "criterion"), number_at(point, "keep")) == (criterion, keep)
    ]
    return found[0] if found else None
