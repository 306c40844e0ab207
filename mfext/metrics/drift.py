"""How far later stages moved the routing of old domains, site by site, and how much of it reaches new experts.

At one site, every routed token puts one unit on each bank that routes it, split evenly over that bank's choices; the
units, divided by their sum, are the site's distribution over (generation, expert). Experts that a growth added had no
share before. The distance of two such distributions is their Jensen-Shannon divergence in nats (Lin 1991).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from mfext.metrics.details import DomainDetails, Site
from mfext.metrics.metric_value import LOWER, MetricValue, mean, mean_of

Expert = tuple[int, int]
NO_OLD = "no domain was learned before the last stage"
OTHER_SITES = "the two models do not have the same sites"
NOT_COUNTED = "no expert usage was counted on"
NOT_ROUTED = "no token was routed at"


def jensen_shannon(p: Iterable[float], q: Iterable[float]) -> float:
    """Jensen-Shannon divergence of two distributions in nats, 0 (equal) to log 2 (disjoint).

    The shorter one is filled with zeros: experts that a growth added had no share before.
    """
    p_E, q_E = list(p), list(q)
    num_experts = max(len(p_E), len(q_E))
    p_E, q_E = (share_E + [0.0] * (num_experts - len(share_E)) for share_E in (p_E, q_E))
    terms = [_towards_mean(a, b) + _towards_mean(b, a) for a, b in zip(p_E, q_E, strict=True)]
    return min(max(math.fsum(terms) / 2, 0.0), math.log(2))


def site_distributions(details: DomainDetails) -> dict[Site, dict[Expert, float]]:
    """Per site its distribution over (generation, expert), all zeros where no token was routed."""
    units: dict[Site, dict[Expert, float]] = {}
    for bank in details.banks:
        site = units.setdefault((bank.layer, bank.kind), {})
        site |= {(bank.generation, expert): share * bank.tokens for expert, share in enumerate(bank.share)}
    totals = {site: math.fsum(found.values()) for site, found in units.items()}
    return {
        site: {expert: unit / totals[site] if totals[site] else 0.0 for expert, unit in found.items()}
        for site, found in units.items()
    }


def site_drift(before: DomainDetails, after: DomainDetails) -> dict[Site, float | None]:
    """Jensen-Shannon divergence in nats per site of `after`; None where a side lacks the site or routed nothing."""
    old = site_distributions(before)
    return {site: _divergence(old.get(site, {}), new) for site, new in site_distributions(after).items()}


def routing_drift(
    before: Mapping[str, DomainDetails], after: Mapping[str, DomainDetails], domains: Iterable[str]
) -> MetricValue:
    """Mean over sites of the mean over old `domains` of `site_drift`, in nats; terms are keyed "layer L KIND"."""
    name, unit = "routing.drift", "nats"
    old = list(domains)
    absent = [domain for domain in old if not (_banks(before, domain) and _banks(after, domain))]
    if absent:
        return MetricValue(name, None, f"{NOT_COUNTED}: {', '.join(absent)}", LOWER, unit)
    if any(_sites(before[domain]) != _sites(after[domain]) for domain in old):
        return MetricValue(name, None, OTHER_SITES, LOWER, unit)
    return _over_sites(name, {domain: site_drift(before[domain], after[domain]) for domain in old}, unit)


def routing_share_new(after: Mapping[str, DomainDetails], domains: Iterable[str]) -> MetricValue:
    """Mean over sites of the mean share of old `domains`' tokens that reach an expert of a growth there."""
    name, unit = "routing.share_new", "share of tokens"
    old = list(domains)
    absent = [domain for domain in old if not _banks(after, domain)]
    if absent:
        return MetricValue(name, None, f"{NOT_COUNTED}: {', '.join(absent)}", LOWER, unit)
    shares = {domain: {(site.layer, site.kind): site.share_new for site in after[domain].sites} for domain in old}
    return _over_sites(name, shares, unit)


def measure_routing(
    before: Mapping[str, DomainDetails], after: Mapping[str, DomainDetails], domains: Iterable[str]
) -> dict[str, MetricValue]:
    """`routing.drift` and `routing.share_new` of old `domains`, from the details of an earlier and a later stage."""
    old = list(domains)
    values = (routing_drift(before, after, old), routing_share_new(after, old))
    return {value.name: value for value in values}


def _towards_mean(a: float, b: float) -> float:
    """a log(a / mean of a and b): exactly 0 where they are equal."""
    return a * math.log(2 * a / (a + b)) if a > 0 else 0.0


def _banks(details: Mapping[str, DomainDetails], domain: str) -> bool:
    return domain in details and bool(details[domain].banks)


def _sites(details: DomainDetails) -> set[Site]:
    return {(bank.layer, bank.kind) for bank in details.banks}


def _divergence(before: Mapping[Expert, float], after: Mapping[Expert, float]) -> float | None:
    if not any(before.values()) or not any(after.values()):
        return None
    experts = sorted({*before, *after})
    return jensen_shannon([before.get(e, 0.0) for e in experts], [after.get(e, 0.0) for e in experts])


def _over_sites(name: str, by_domain: Mapping[str, Mapping[Site, float | None]], unit: str) -> MetricValue:
    """Per site the mean over domains, and the mean over sites; undefined where a domain lacks a site."""
    sites = sorted({site for found in by_domain.values() for site in found})
    terms: dict[str, float | None] = {}
    for site in sites:
        values = [found.get(site) for found in by_domain.values()]
        known = [value for value in values if value is not None]
        terms[f"layer {site[0]} {site[1]}"] = mean(known) if len(known) == len(values) else None
    return mean_of(name, terms, LOWER, none=NO_OLD, missing=NOT_ROUTED, unit=unit)
