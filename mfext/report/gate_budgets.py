"""Each domain gate against the budget it was calibrated to, on the text an evaluation measured."""

from __future__ import annotations

from collections.abc import Mapping

from mfext.report.quantities import NONE, percent, plural, printable
from mfext.report.reading import Json, flag, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import Table

ROLES = {"own": "its own", "earlier": "learned before it", "later": "learned after it", "never": "never trained"}
WORDS = ("gate of", "domain", "which is", "within")


def budget_table(data: Json) -> Table | None:
    """Gate by domain, from `data["gates"]` (commands/gate_budgets.py); None where no generation has a gate."""
    rows = tuple(
        (
            text(gate, "generation"),
            domain,
            ROLES.get(text(on, "role"), text(on, "role")),
            percent(number_at(on, "share_open")),
            percent(number_at(on, "share_not_full")),
            percent(
                number_at(gate, "calibrated_false_close" if text(on, "role") == "own" else "calibrated_false_open")
            ),
            NONE if text(on, "role") == "own" else percent(number_at(gate, "max_false_open")),
            {True: "yes", False: "NO", None: NONE}[flag(on, "within_budget")],
        )
        for gate in objects(data, "gates")
        for domain, on in mapping(gate, "on").items()
        if isinstance(on, Mapping)
    )
    if not rows:
        return None
    return Table(
        "Gates against their budget",
        columns=("gate of", "domain", "which is", "open", "not fully open", "calibrated", "budget", "within"),
        rows=rows,
        text_columns=WORDS,
        note="Shares of tokens. The budget bounds on how much of other text a gate may open. Calibrated: what the "
        "calibration saw on held-out probes (open) and on held-out text of its own (not fully open). Within: whether "
        "the budget holds on the text measured here. For the gate's own domain there is no budget.",
    )


def budget_line(data: Json) -> str:
    """How many budgets are broken on text learned before the gate, in a sentence; empty where nothing says."""
    held: dict[str, bool] = {}
    for gate in objects(data, "gates"):
        for domain, on in mapping(gate, "on").items():
            within = flag(on, "within_budget") if isinstance(on, Mapping) and text(on, "role") == "earlier" else None
            if within is not None:
                held[f"{printable(text(gate, 'generation'))} on {printable(domain)}"] = within
    if not held:
        return ""
    broken = [name for name, within in held.items() if not within]
    if not broken:
        return "every gate keeps its budget of false opens on the domains learned before it"
    return f"over the budget of false opens, {len(broken)} of {plural(len(held), 'case')}: {', '.join(broken)}"
