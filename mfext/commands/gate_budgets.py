"""What each gate's calibration promised, held against the text that an evaluation measured.

Thresholds are set on held-out probes, as a rule samples of the model itself; whether they keep the budget on real text
is another question, and this answers it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mfext.config import ModelConfig
from mfext.report.reading import Json, listed, mapping, number, objects, text


def gate_budgets(config: ModelConfig, metadata: Json, measured: Mapping[str, Json]) -> list[dict[str, object]]:
    """One entry for each gated generation, in their order, with its gate on every domain measured.

    `metadata` is the model folder's; `measured` holds each domain's `gates` (GateUsage as plain JSON). A domain's role:
    own (the generation learned it), earlier, later, or never (trained). `max_false_open` and what the calibration saw
    are None where the lineage does not say. `within_budget`: share_open against the budget; None for own domains.
    """
    lineage = objects(metadata, "lineage")
    names = [each.name for each in config.generations if each.mode == "gated"]
    return [_of_gate(index, name, lineage, measured) for index, name in enumerate(names)]


def _of_gate(index: int, name: str, lineage: Sequence[Json], measured: Mapping[str, Json]) -> dict[str, object]:
    # The last of that name: an earlier generation may have been dropped and grown anew.
    place = max((number for number, each in enumerate(lineage) if text(each, "name") == name), default=None)
    entry: Json = {} if place is None else lineage[place]
    budget = number(entry, "gate", "max_false_open")
    own = _domains(entry) or (name,)
    on: dict[str, object] = {}
    for domain, gates in measured.items():
        gate = next((each for each in objects(gates, "gates") if number(each, "gate") == index), {})
        opened = number(gate, "share_open")
        role = "own" if domain in own else _role(domain, lineage, place)
        on[domain] = {
            "role": role,
            "share_open": opened,
            "share_not_full": number(gate, "share_not_full"),
            "within_budget": None if role == "own" or budget is None or opened is None else opened <= budget,
        }
    calibrated = mapping(entry, "gate")
    return {
        "generation": name,
        "domains": list(own),
        "max_false_open": budget,
        "calibrated_false_open": number(calibrated, "false_open"),
        "calibrated_false_close": number(calibrated, "false_close"),
        "on": on,
    }


def _role(domain: str, lineage: Sequence[Json], place: int | None) -> str:
    if place is not None and any(domain in _domains(each) for each in lineage[:place]):
        return "earlier"
    return "later" if any(domain in _domains(each) for each in lineage) else "never"


def _domains(entry: Json) -> tuple[str, ...]:
    return tuple(str(each) for each in listed(entry, "domains"))
