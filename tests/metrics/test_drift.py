"""Routing drift and the share reaching new experts, per site and in the mean, against numbers by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.errors import InputError
from mfext.metrics.details import BankShares, DomainDetails, SiteShare, read_details
from mfext.metrics.drift import (
    jensen_shannon,
    measure_routing,
    routing_drift,
    routing_share_new,
    site_distributions,
    site_drift,
)
from mfext.metrics.usage import UsageCounter
from mfext.model.router import Site, route

FF, ATT = (0, "feedforward"), (1, "attention")


def bank(site: tuple[int, str], share: tuple[float, ...], tokens: int = 100, generation: int = 0) -> BankShares:
    return BankShares(*site, generation, tokens, share)


BEFORE = DomainDetails((bank(FF, (0.5, 0.5)), bank(ATT, (1.0, 0.0))), (SiteShare(*FF, 0.0), SiteShare(*ATT, 0.0)))
# A generation sees 25 of 100 tokens at the first site; at the second a competing expert joined the base's own bank.
AFTER = DomainDetails(
    (bank(FF, (0.5, 0.5)), bank(FF, (1.0,), 25, generation=1), bank(ATT, (0.5, 0.0, 0.5))),
    (SiteShare(*FF, 0.25), SiteShare(*ATT, 0.5)),
)


def test_divergence_is_zero_for_equal_log_two_for_disjoint_and_symmetric() -> None:
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    assert jensen_shannon(p, p) == 0.0
    assert jensen_shannon((1.0,), (0.0, 1.0)) == pytest.approx(math.log(2))
    assert jensen_shannon(p, q) == jensen_shannon(q, p)
    by_hand = 0.5 * (0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)) * 2
    assert jensen_shannon(p, q) == pytest.approx(by_hand)


SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda each: sum(each) > 0.01)


@settings(deadline=None, max_examples=100)
@given(SHARES, SHARES)
def test_divergence_is_symmetric_bounded_and_zero_only_between_equals(p: list[float], q: list[float]) -> None:
    p, q = ([share / math.fsum(each) for share in each] for each in (p, q))
    assert jensen_shannon(p, q) == jensen_shannon(q, p)
    assert 0 <= jensen_shannon(p, q) <= math.log(2)
    assert jensen_shannon(p, p) == 0.0


def test_a_site_weighs_its_banks_by_the_tokens_they_routed() -> None:
    assert site_distributions(AFTER)[FF] == {(0, 0): 50 / 125, (0, 1): 50 / 125, (1, 0): 25 / 125}
    assert site_distributions(AFTER)[ATT] == {(0, 0): 0.5, (0, 1): 0.0, (0, 2): 0.5}


def test_new_experts_had_no_share_before() -> None:
    drift = site_drift(BEFORE, AFTER)
    assert drift[FF] == pytest.approx(jensen_shannon((0.5, 0.5, 0.0), (0.4, 0.4, 0.2)))
    assert drift[ATT] == pytest.approx(jensen_shannon((1.0, 0.0, 0.0), (0.5, 0.0, 0.5)))


def test_drift_is_the_mean_over_sites_of_the_mean_over_domains() -> None:
    same = {"prose": BEFORE, "facts": BEFORE}
    value = routing_drift(same, {"prose": AFTER, "facts": BEFORE}, ["prose", "facts"])
    drift = {site: loss or 0.0 for site, loss in site_drift(BEFORE, AFTER).items()}
    assert value.domains == pytest.approx({"layer 0 feedforward": drift[FF] / 2, "layer 1 attention": drift[ATT] / 2})
    assert value.value == pytest.approx((drift[FF] + drift[ATT]) / 4)
    assert (value.unit, value.direction) == ("nats", "lower is better")
    assert routing_drift(same, same, ["prose", "facts"]).value == 0.0


def test_share_new_is_the_mean_over_sites_of_the_mean_over_domains() -> None:
    value = routing_share_new({"prose": AFTER, "facts": BEFORE}, ["prose", "facts"])
    assert value.domains == {"layer 0 feedforward": 0.125, "layer 1 attention": 0.25}
    assert value.value == 0.1875


def test_what_was_not_counted_or_does_not_match_is_undefined_and_says_so() -> None:
    before = {"prose": BEFORE}
    nothing = measure_routing(before, before, [])
    assert {value.reason for value in nothing.values()} == {"no domain was learned before the last stage"}
    absent = measure_routing(before, {"prose": DomainDetails()}, ["prose"])
    assert {value.reason for value in absent.values()} == {"no expert usage was counted on: prose"}
    deeper = DomainDetails((*AFTER.banks, bank((2, "attention"), (1.0,))), AFTER.sites)
    assert "same sites" in str(routing_drift(before, {"prose": deeper}, ["prose"]).reason)
    silent = DomainDetails((bank(FF, (0.0, 0.0), tokens=0), BEFORE.banks[1]), BEFORE.sites)
    assert routing_drift(before, {"prose": silent}, ["prose"]).reason == ("no token was routed at: layer 0 feedforward")


def written(usage: object) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps({"prose": {"usage": usage, "gates": []}}))
    return plain


def test_the_details_a_model_run_writes_are_read_back() -> None:
    counter = UsageCounter({"attention": 3})
    logits_NE = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    counter.update([route(logits_NE, 2, Site(1, "attention"))], torch.ones(40))
    usage = counter.usage()
    details = read_details(written(usage.to_json()))["prose"]
    assert details.banks[0].share == usage.banks[0].share and details.banks[0].tokens == 40
    assert details.sites == (SiteShare(1, "attention", usage.share_new_by_site[1, "attention"]),)
    assert read_details(written(None)) == {"prose": DomainDetails()}


@pytest.mark.parametrize(
    ("usage", "message"),
    [
        (
            {"banks": [{"layer": 0, "kind": "attention", "generation": 0, "tokens": 3}]},
            r"missing key 'share'.*banks\[0\]",
        ),
        ({"banks": {"layer": 0}}, r"expected a list.*prose\.usage\.banks.*measure the stage again"),
        ({"sites": [3]}, r"expected keys and values.*sites\[0\]"),
        ({"sites": [{"layer": "0", "kind": "attention", "share_new": 0.0}]}, r"wrong type.*sites\[0\]\.layer"),
    ],
)
def test_a_damaged_details_file_is_one_clear_error(usage: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_details(written(usage), "details-001.json")
