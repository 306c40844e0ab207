"""The paired bootstrap: right point estimate, right coverage, honest about what cannot be tested."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.errors import InputError
from mfext.metrics.bootstrap import Interval, PairedDocuments, mean_interval, pair_rows, paired_interval
from mfext.metrics.ledger import LedgerRow


def noisy(seed: int, shift: float, num_documents: int = 40) -> PairedDocuments:
    random = np.random.default_rng(seed)
    sizes = random.integers(50, 500, num_documents)
    nats_a = sizes * random.uniform(1.0, 4.0, num_documents)
    nats_b = nats_a + sizes * random.normal(shift, 0.1, num_documents)
    return PairedDocuments(nats_a.tolist(), nats_b.tolist(), sizes.tolist(), f"domain{seed}")


def test_the_difference_is_the_byte_weighted_mean_b_minus_a() -> None:
    interval = paired_interval([10.0, 4.0], [12.0, 3.0], [8, 2], samples=50, seed=0)
    assert interval.difference == pytest.approx((2.0 - 1.0) / 10)
    assert interval.low == pytest.approx(-0.5) and interval.high == pytest.approx(0.25)


def test_a_constant_change_per_byte_has_an_interval_of_no_width() -> None:
    interval = paired_interval([8.0, 2.0, 4.0], [12.0, 3.0, 6.0], [8, 2, 4], samples=100, seed=0)
    assert (interval.difference, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_the_interval_holds_the_true_change_about_95_times_in_100() -> None:
    intervals = [
        paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=300, seed=seed)
        for seed in range(200)
        for pair in [noisy(seed, 0.05)]
    ]
    inside = sum(each.low <= 0.05 <= each.high for each in intervals if each.low is not None and each.high is not None)
    assert 176 <= inside <= 198  # percentile intervals at 40 documents cover a little less than 95 %


def test_pairing_removes_the_variance_between_documents() -> None:
    pair = noisy(1, 0.05, 100)
    interval = paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=500, seed=0)
    assert interval.low is not None and interval.high is not None
    assert 0 < interval.low < interval.high < 0.1  # unpaired, documents alone spread over +-0.2


def test_the_seed_decides_everything() -> None:
    pair = noisy(2, 0.0)
    runs = [paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=100, seed=seed) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0].difference == runs[2].difference


def test_the_mean_over_domains_weighs_domains_equally() -> None:
    small, large = noisy(3, 0.2, 10), noisy(4, 0.0, 400)
    interval = mean_interval([small, large], samples=300, seed=0)
    each = [paired_interval(p.nats_a, p.nats_b, p.bytes, samples=300, seed=0).difference for p in (small, large)]
    assert interval.difference == pytest.approx(sum(d for d in each if d is not None) / 2)
    assert interval.low is not None and interval.high is not None and interval.difference is not None
    assert interval.low < interval.difference < interval.high


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4), st.integers(1, 5000)), min_size=2, max_size=8),
    st.randoms(use_true_random=False),
)
def test_permuting_documents_leaves_every_bit_of_the_difference(documents, random) -> None:
    def difference(order: list[tuple[float, float, int]]) -> float | None:
        nats_a, nats_b, sizes = zip(*order, strict=True)
        return mean_interval([PairedDocuments(nats_a, nats_b, sizes, "prose")], samples=2, seed=0).difference

    assert difference(documents) == difference(random.sample(documents, len(documents)))


def test_one_document_is_not_testable_and_says_so() -> None:
    assert paired_interval([2.0], [3.0], [4], samples=10, seed=0) == Interval(
        0.25, None, None, "not testable: fewer than 2 documents"
    )
    mean = mean_interval([noisy(5, 0.0), PairedDocuments([2.0], [3.0], [4], "short")], samples=10, seed=0)
    assert mean.difference is not None
    assert (mean.low, mean.reason) == (None, "not testable: fewer than 2 documents in short")


def test_no_document_and_no_domain_have_no_difference() -> None:
    assert paired_interval([], [], [], samples=10, seed=0) == Interval(None, None, None, "not testable: no document")
    assert mean_interval([], samples=10, seed=0) == Interval(None, None, None, "not testable: no domain")


def test_empty_documents_do_not_count() -> None:
    with_empty = paired_interval([2.0, 0.0, 4.0], [3.0, 0.0, 4.5], [4, 0, 4], samples=100, seed=3)
    assert with_empty == paired_interval([2.0, 4.0], [3.0, 4.5], [4, 4], samples=100, seed=3)
    assert paired_interval([2.0, 0.0], [3.0, 0.0], [4, 0], samples=10, seed=0).reason is not None


def test_many_documents_are_drawn_in_bounded_memory_and_time() -> None:
    pair = noisy(6, 0.0, 5000)
    began = time.perf_counter()
    paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=500, seed=0)
    assert time.perf_counter() - began < 5


def test_rows_of_different_documents_are_refused() -> None:
    row = LedgerRow(0, 0, "prose", "test", 3.0, 3, 3, 2, (1.0, 2.0), (1, 2), "aa", "m", 1, 0.0, "t", "base")
    after = replace(row, stage=1, nll_nats=5.0, document_nats=(1.0, 4.0))
    assert pair_rows(row, after) == PairedDocuments((1.0, 2.0), (1.0, 4.0), (1, 2), "prose")
    with pytest.raises(InputError, match="different documents"):
        pair_rows(row, replace(after, split_sha256="bb"))
