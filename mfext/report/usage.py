"""Sections on what a model's experts do on domains: layers by experts, balance, overlap of domains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from mfext.report.experts import KIND_NAMES, Newcomers, expert_groups, old_and_new, site_shares
from mfext.report.extras import newcomers_of
from mfext.report.quantities import NONE, bits, percent, plural
from mfext.report.reading import Json, as_number, listed, mapping, objects, text
from mfext.report.reading import number as number_at
from mfext.report.report import HeatMap, HeatMaps, Section, Table

BASE = "base"
# Full colour, in even splits over the base's experts: from here on an expert is much too popular to tell apart.
FULL_AT = 3.0
# Domains that the lines under the headline name.
NAMED = 4

# Per generation at a site (layer, kind): a share of all that happened there, per expert.
SiteShares = Callable[[Json, tuple[int, str]], dict[int, tuple[float, ...]]]


def usage_sections(data: Json) -> list[Section]:
    """Empty without `data["usage"]`: domain -> Usage.to_json(); `data["overlap"]` as commands/inspect.py writes it."""
    usages = _usages(data)
    if not usages:
        return []
    newcomers = newcomers_of(objects(data, "generations"))
    sections: list[Section] = [
        HeatMaps(
            "Expert usage",
            maps=_layer_maps(usages, newcomers, site_shares),
            note="Rows are layers, columns experts. Per cent of a domain's choices (tokens times experts per token). "
            "A base's layer adds up to 100, a gated generation's to the share its gate let through.",
        ),
        HeatMaps(
            "Contribution",
            maps=_layer_maps(usages, newcomers, _contributed),
            note="Per cent of the layer's sum, over a domain's tokens, of gate times L2 norm of the expert's output.",
            in_terminal=False,
        ),
        _balance(usages, newcomers),
        *_overlaps(data),
    ]
    if newcomers:
        sections.append(dataclasses.replace(old_and_new(usages), in_terminal=True))
    return sections


def usage_verdict(data: Json) -> tuple[str, ...]:
    """A line per domain on dead and hot experts, for the first few."""
    lines = []
    for name, usage in list(_usages(data).items())[:NAMED]:
        banks = [bank for bank in objects(usage, "banks") if number_at(bank, "tokens")]
        experts = sum(len(listed(bank, "share")) for bank in banks)
        dead, hot = (round(sum(number_at(bank, f"{word}_experts") or 0 for bank in banks)) for word in ("dead", "hot"))
        even = percent(_evenness(banks))
        lines.append(f"{name}: {dead} of {plural(experts, 'expert')} dead, {hot} hot; entropy {even} of an even split")
    return tuple(lines)


def _usages(data: Json) -> dict[str, Json]:
    return {name: usage for name, usage in mapping(data, "usage").items() if isinstance(usage, Mapping)}


def _layer_maps(usages: Mapping[str, Json], newcomers: Sequence[Newcomers], shares: SiteShares) -> tuple[HeatMap, ...]:
    """Per kind and domain a map of layers by experts, those of a kind with the same columns and colours."""
    maps: list[HeatMap] = []
    for kind, name in KIND_NAMES.items():
        found = {domain: _by_owner(usage, kind, newcomers, shares) for domain, usage in usages.items()}
        widths: dict[str, int] = {}
        for layers in found.values():
            for owners in layers.values():
                for owner, values in owners.items():
                    widths[owner] = max(widths.get(owner, 0), len(values))
        if widths:
            full = min(100.0, FULL_AT * 100.0 / max(1, widths.get(BASE, 1)))
            maps += [_layer_map(f"{domain} · {name}", layers, widths, full) for domain, layers in found.items()]
    return tuple(maps)


def _by_owner(
    usage: Json, kind: str, newcomers: Sequence[Newcomers], shares: SiteShares
) -> dict[int, dict[str, tuple[float, ...]]]:
    """Per layer and who added the experts (the base first, then every generation) their shares."""
    layers = sorted(
        {int(number_at(bank, "layer") or 0) for bank in objects(usage, "banks") if text(bank, "kind") == kind}
    )
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    for layer in layers:
        owners = found.setdefault(layer, {})
        for generation, values in sorted(shares(usage, (layer, kind)).items()):
            first = 0
            for owner, size in expert_groups(generation, len(values), (layer, kind), newcomers):
                owners[owner] = values[first : first + size]
                first += size
    return found


def _layer_map(
    title: str, layers: Mapping[int, Mapping[str, tuple[float, ...]]], widths: Mapping[str, int], full: float
) -> HeatMap:
    rows = []
    for owners in layers.values():
        row: list[float | None] = []
        for owner, width in widths.items():
            values = owners.get(owner, ())
            row += [*(100 * value for value in values), *([None] * (width - len(values)))]
        rows.append(tuple(row))
    return HeatMap(
        title,
        rows=tuple(f"layer {layer}" for layer in layers),
        columns=tuple(str(number) for width in widths.values() for number in range(width)),
        values=tuple(rows),
        unit="%",
        digits=0,
        groups=tuple(widths.items()) if len(widths) > 1 else (),
        full=full,
        missing="no such expert, or no token was let through",
    )


def _contributed(usage: Json, site: tuple[int, str]) -> dict[int, tuple[float, ...]]:
    """Per generation at a site: share of the site's sum of gate times output norm per expert."""
    sums: dict[int, tuple[float, ...]] = {}
    for bank in objects(usage, "banks"):
        if number_at(bank, "layer") == site[0] and text(bank, "kind") == site[1]:
            tokens = number_at(bank, "tokens") or 0.0
            values = tuple((as_number(each) or 0.0) * tokens for each in listed(bank, "contribution"))
            sums[int(number_at(bank, "generation") or 0)] = values
    total = math.fsum(value for values in sums.values() for value in values) or 1.0
    return {generation: tuple(value / total for value in values) for generation, values in sums.items()}


def _balance(usages: Mapping[str, Json], newcomers: Sequence[Newcomers]) -> Table:
    """Per domain, kind and router: how evenly it chooses, and how many experts it hardly or mostly uses."""
    rows = []
    for domain, usage in usages.items():
        tokens = number_at(usage, "tokens") or 0.0
        for kind, name in KIND_NAMES.items():
            of_kind = [bank for bank in objects(usage, "banks") if text(bank, "kind") == kind]
            for generation in sorted({int(number_at(bank, "generation") or 0) for bank in of_kind}):
                banks = [bank for bank in of_kind if number_at(bank, "generation") == generation]
                routed = sum(number_at(bank, "tokens") or 0.0 for bank in banks) / len(banks)
                cells = (percent(routed / tokens if tokens else 0.0), *_balance_cells(banks))
                rows.append((domain, name, _owners(banks[0], kind, newcomers), *cells))
    columns = ("domain", "kind", "experts", "tokens", "entropy", "dead", "hot")
    note = (
        "Tokens: share that the router saw. Entropy of the shares, 100 % where they are even, mean over layers. Dead: "
        "experts below a tenth of an even share; hot: above twice of it; of all layers together."
    )
    return Table("Balance", columns=columns, rows=tuple(rows), text_columns=columns[:3], note=note)


def _balance_cells(banks: Sequence[Json]) -> tuple[str, str, str]:
    used = [bank for bank in banks if number_at(bank, "tokens")]
    if not used:
        return NONE, NONE, NONE
    experts = sum(len(listed(bank, "share")) for bank in used)
    dead, hot = (round(sum(number_at(bank, f"{word}_experts") or 0 for bank in used)) for word in ("dead", "hot"))
    return percent(_evenness(used)), f"{dead} of {experts}", f"{hot} of {experts}"


def _evenness(banks: Sequence[Json]) -> float | None:
    """Mean over banks of more than one expert of the entropy of their shares, 1 where they are even."""
    shares = [
        (number_at(bank, "entropy_nats") or 0.0) / math.log(experts)
        for bank in banks
        if (experts := len(listed(bank, "share"))) > 1
    ]
    return math.fsum(shares) / len(shares) if shares else None


def _owners(bank: Json, kind: str, newcomers: Sequence[Newcomers]) -> str:
    site = (int(number_at(bank, "layer") or 0), kind)
    generation = int(number_at(bank, "generation") or 0)
    return " + ".join(name for name, _ in expert_groups(generation, len(listed(bank, "share")), site, newcomers))


def _overlaps(data: Json) -> list[Section]:
    names = tuple(str(name) for name in listed(data, "overlap", "domains"))
    if len(names) < 2:
        return []

    def matrix(key: str) -> tuple[tuple[float | None, ...], ...]:
        rows = listed(data, "overlap", key)
        return tuple(tuple(as_number(value) for value in row) for row in rows if isinstance(row, Sequence))

    divergences = tuple(tuple(bits(value) for value in row) for row in matrix("divergence_nats"))
    missing = "no layer routes tokens of both"
    alike = "Cosine of the shares, mean over layers and kinds: 1 where they are equal, 0 where no expert is shared."
    apart = "Jensen-Shannon divergence of the shares: 0 bits where they are equal, 1 bit where no expert is shared."
    shape = HeatMap("", rows=names, columns=names, values=divergences, full=1.0, missing=missing)
    return [
        dataclasses.replace(
            shape, title="Overlap of domains", values=matrix("cosine"), digits=2, unit="cosine", note=alike
        ),
        dataclasses.replace(shape, title="Divergence of domains", unit="bits", note=apart),
    ]
