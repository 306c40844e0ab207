"""Sections on who did the work: expert usage, old against new experts, domain gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mfext.report.quantities import number, percent
from mfext.report.reading import Json, as_number, listed, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import HeatMap, HeatMaps, Section, ShareRow, Shares

# {"usage": Usage.to_json() | None, "gates": [{gate, share_open, share_not_full, lag_tokens_mean}]}
DomainDetails = Json
# More gates than this are shown as one picture.
SHOWN_IN_FULL = 2
KIND_NAMES = {"attention": "attention", "feedforward": "feed-forward"}


@dataclass(frozen=True)
class Newcomers:
    """What one growth added: experts per layer, by kind. Gated ones have a router and gate of their own."""

    name: str
    mode: str
    attention_experts: tuple[int, ...]
    feedforward_experts: tuple[int, ...]

    def experts(self, layer: int, kind: str) -> int:
        """How many experts it added at a site."""
        counts = self.attention_experts if kind == "attention" else self.feedforward_experts
        return counts[layer] if layer < len(counts) else 0


def expert_sections(details: Mapping[str, DomainDetails], newcomers: Sequence[Newcomers]) -> list[Section]:
    """Usage domain x expert per site, and per domain how much of the routing reached new experts."""
    usages = {name: usage for name, each in details.items() if isinstance(usage := each.get("usage"), Mapping)}
    if not usages:
        return []
    sites = dict.fromkeys(
        (int(layer), text(bank, "kind"))
        for usage in usages.values()
        for bank in objects(usage, "banks")
        if (layer := number_at(bank, "layer")) is not None
    )
    maps = [_site_map(usages, site, newcomers) for site in sorted(sites, key=lambda site: (site[1], site[0]))]
    note = (
        "Each square: per cent of the domain's tokens times choices that fell on the expert. Rows of a bank add up to "
        "100; a gated generation's rows to the share of tokens its gate let through."
    )
    sections: list[Section] = [HeatMaps("Expert usage", maps=tuple(maps), note=note, in_terminal=False)]
    if newcomers:
        sections.append(old_and_new(usages))
    return sections


def _site_map(usages: Mapping[str, Json], site: tuple[int, str], newcomers: Sequence[Newcomers]) -> HeatMap:
    layer, kind = site
    shares = {name: site_shares(usage, site) for name, usage in usages.items()}
    generations = sorted({generation for banks in shares.values() for generation in banks})
    widths = {
        generation: max(len(banks.get(generation, ())) for banks in shares.values()) for generation in generations
    }
    columns: list[str] = []
    groups: list[tuple[str, int]] = []
    for generation in generations:
        for name, size in expert_groups(generation, widths[generation], site, newcomers):
            groups.append((name, size))
            columns += [str(number) for number in range(size)]
    values = []
    for banks in shares.values():
        row: list[float | None] = []
        for generation in generations:
            bank = banks.get(generation, ())
            row += [100 * share for share in bank] + [0.0] * (widths[generation] - len(bank))
        values.append(tuple(row))
    return HeatMap(
        f"layer {layer} {KIND_NAMES.get(kind, kind)}",
        rows=tuple(shares),
        columns=tuple(columns),
        values=tuple(values),
        unit="%",
        digits=0,
        groups=tuple(groups) if len(groups) > 1 else (),
    )


def site_shares(usage: Json, site: tuple[int, str]) -> dict[int, tuple[float, ...]]:
    """Per generation at a site: share of all tokens' choices per expert."""
    tokens = number_at(usage, "tokens") or 0.0
    found: dict[int, tuple[float, ...]] = {}
    for bank in objects(usage, "banks"):
        if number_at(bank, "layer") == site[0] and text(bank, "kind") == site[1]:
            reached = (number_at(bank, "tokens") or 0.0) / tokens if tokens else 0.0
            share = tuple((as_number(each) or 0.0) * reached for each in listed(bank, "share"))
            found[int(number_at(bank, "generation") or 0)] = share
    return found


def expert_groups(
    generation: int, width: int, site: tuple[int, str], newcomers: Sequence[Newcomers]
) -> list[tuple[str, int]]:
    """Runs of a bank's experts by who added them; those in the base's softmax stand behind its own in its bank."""
    if generation > 0:
        name = newcomers[generation - 1].name if generation <= len(newcomers) else f"generation {generation}"
        return [(name, width)] if width else []
    added = [(each.name, each.experts(*site)) for each in newcomers if each.mode in ("compete", "preserve")]
    added = [(name, size) for name, size in added if size]
    own = width - sum(size for _, size in added)
    if own < 0:
        return [("base", width)]
    return [("base", own), *added]


def old_and_new(usages: Mapping[str, Json]) -> Shares:
    """Per domain how many of its tokens reached an expert of a growth."""
    rows = []
    for name, usage in usages.items():
        shares = [share for site in objects(usage, "sites") if (share := number_at(site, "share_new")) is not None]
        new = min(1.0, max(0.0, sum(shares) / len(shares))) if shares else 0.0
        rows.append(ShareRow(name, (1 - new, new), percent(new)))
    return Shares(
        "Routing to old and new experts",
        parts=("old experts only", "reaching new experts"),
        rows=tuple(rows),
        detail_name="new",
        note="Share of each domain's tokens, averaged over the layers.",
        in_terminal=False,
    )


def gate_sections(details: Mapping[str, DomainDetails], newcomers: Sequence[Newcomers]) -> list[Section]:
    """Per gated generation: how far its gate opens on every domain, and how soon it has made up its mind."""
    gated = [each.name for each in newcomers if each.mode == "gated"]
    count = max((len(objects(each, "gates")) for each in details.values()), default=0)
    if count > SHOWN_IN_FULL:
        return [_gates_at_a_glance(details, [gated[i] if i < len(gated) else str(i) for i in range(count)])]
    sections: list[Section] = []
    for index in range(count):
        rows = []
        for name, each in details.items():
            gates = objects(each, "gates")
            if index < len(gates):
                rows.append(_gate_row(name, gates[index]))
        owner = gated[index] if index < len(gated) else str(index)
        sections.append(
            Shares(
                f"Gate of {owner}",
                parts=("closed", "partly open", "fully open"),
                rows=tuple(rows),
                detail_name="tokens until settled",
                note="Share of each domain's tokens. Where it is closed, the token takes the old path.",
                in_terminal=False,
            )
        )
    return sections


def _gates_at_a_glance(details: Mapping[str, DomainDetails], owners: Sequence[str]) -> HeatMap:
    """Many gates as one picture: per domain and generation the share of tokens its gate lets through."""
    values = []
    for each in details.values():
        shares = [number_at(gate, "share_open") for gate in objects(each, "gates")[: len(owners)]]
        shares += [None] * (len(owners) - len(shares))
        values.append(tuple(None if share is None else 100 * share for share in shares))
    return HeatMap(
        "Gates",
        rows=tuple(details),
        columns=tuple(owners),
        values=tuple(values),
        unit="% of tokens",
        digits=1,
        full=100.0,
        note="Per cent of each domain's tokens for which a generation's gate is open. Elsewhere it costs nothing.",
        in_terminal=False,
    )


def _gate_row(name: str, gate: Json) -> ShareRow:
    opened = min(1.0, max(0.0, number_at(gate, "share_open") or 0.0))
    full = min(opened, max(0.0, 1 - (number_at(gate, "share_not_full") or 0.0)))
    lag = number_at(gate, "lag_tokens_mean")
    settled = f"settles in {number(lag, 0 if lag >= 10 else 1)} tokens" if lag is not None else ""
    return ShareRow(name, (1 - opened, opened - full, full), f"open {percent(opened)}", settled)
