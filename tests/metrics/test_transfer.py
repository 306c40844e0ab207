"""Every metric against hand-made matrices, one per convention, and properties that hold for all matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.errors import InputError
from mfext.metrics.ledger import Ledger, LedgerRow
from mfext.metrics.transfer import METRICS, TransferMatrix, average, forgetting_max, learned, measure

# Rows: base, code, german. Columns: prose (base), facts (base), code (1), german (2), chinese (never trained).
GOLDEN = TransferMatrix(
    stage_names=("base", "code", "german"),
    domains=("prose", "facts", "code", "german", "chinese"),
    nll_per_byte=(
        (2.0, 3.0, 5.0, 6.0, 8.0),
        (2.5, 2.75, 1.5, 5.5, 8.5),
        (2.25, 3.5, 1.75, 2.0, 9.0),
    ),
    learned_stage={"prose": 0, "facts": 0, "code": 1, "german": 2, "chinese": None},
)
# prose: last 2.25, learned 2.0, best before 2.0. facts: 3.5, 3.0, 2.75. code: 1.75, 1.5, 1.5.
EXPECTED = {
    "forgetting.base": ((0.25 + 0.5) / 2, "lower is better"),
    "forgetting.first_last": ((0.25 + 0.5 + 0.25) / 3, "lower is better"),
    "forgetting.max": ((0.25 + 0.75 + 0.25) / 3, "lower is better"),
    "forgetting.max_incl_last": ((0.25 + 0.75 + 0.25) / 3, "lower is better"),
    "bwt.gem": (-(0.25 + 0.5 + 0.25) / 3, "higher is better"),
    "learned": ((3.5 + 3.5) / 2, "higher is better"),
    "bystander": (1.0, "lower is better"),
    "average": ((2.25 + 3.5 + 1.75 + 2.0) / 4, "lower is better"),
}


def row(
    stage: int, domain: str, documents: Sequence[tuple[float, int]], step: int = 0, split: str = "validation"
) -> LedgerRow:
    nats, sizes = tuple(nats for nats, _ in documents), tuple(size for _, size in documents)
    return LedgerRow(
        stage, step, domain, split, math.fsum(nats), sum(sizes), sum(sizes), len(nats), nats, sizes,
        "hash", "model", 1, 0.0, "2026-01-01T00:00:00+00:00", f"name {stage}",
    )  # fmt: skip


def test_every_metric_has_its_golden_value_and_direction() -> None:
    values = measure(GOLDEN)
    assert set(values) == set(EXPECTED)
    for name, (value, direction) in EXPECTED.items():
        assert values[name].value == pytest.approx(value, rel=1e-15), name
        assert (values[name].direction, values[name].unit, values[name].reason) == (direction, "nats per byte", None)


def test_a_metric_names_the_terms_it_is_the_mean_of() -> None:
    assert measure(GOLDEN)["forgetting.base"].domains == {"prose": 0.25, "facts": 0.5}
    assert json.loads(json.dumps(measure(GOLDEN)["learned"].to_json())) == {
        "value": 3.5,
        "reason": None,
        "direction": "higher is better",
        "unit": "nats per byte",
        "domains": {"code": 3.5, "german": 3.5},
    }


def test_the_variants_disagree_in_value_and_sign_where_the_last_stage_is_best() -> None:
    matrix = TransferMatrix(
        ("base", "a", "b"), ("old",), ((4.0,), (2.0,), (1.0,)), {"old": 0}
    )  # old text improves twice
    values = {name: value.value for name, value in measure(matrix).items()}
    assert values["forgetting.base"] == values["forgetting.first_last"] == -3.0
    assert values["bwt.gem"] == 3.0
    assert values["forgetting.max"] == -1.0
    assert values["forgetting.max_incl_last"] == 0.0


def test_chaudhrys_maximum_looks_at_stages_after_learning_too() -> None:
    matrix = TransferMatrix(("base", "a", "b"), ("old",), ((3.0,), (1.0,), (2.0,)), {"old": 0})
    values = {name: value.value for name, value in measure(matrix).items()}
    assert (values["forgetting.max"], values["forgetting.base"]) == (1.0, -1.0)


def test_a_stream_that_pretrains_its_first_domain_counts_it_as_old_but_not_as_the_bases() -> None:
    matrix = TransferMatrix(("random", "a", "b"), ("a", "b"), ((8.0, 8.0), (2.0, 7.0), (2.5, 3.0)), {"a": 1, "b": 2})
    values = measure(matrix)
    assert values["forgetting.base"].value is None and "no domain of the base" in str(values["forgetting.base"].reason)
    assert values["forgetting.first_last"].value == 0.5
    assert values["learned"].value == (6.0 + 4.0) / 2


def test_only_the_base_measured_gives_reasons_instead_of_numbers() -> None:
    values = measure(TransferMatrix(("base",), ("prose", "other"), ((2.0, 4.0),), {"prose": 0, "other": None}))
    assert values.pop("average").value == 2.0
    assert [value.value for value in values.values()] == [None] * 7
    assert all(value.reason for value in values.values())


def test_nothing_measured_gives_reasons_instead_of_numbers() -> None:
    values = measure(TransferMatrix.from_ledger(Ledger(), ["prose"], {}))
    assert all(value.value is None and value.reason for value in values.values())


def test_a_missing_measurement_makes_exactly_the_metrics_that_need_it_undefined() -> None:
    rows = [list(stage) for stage in GOLDEN.nll_per_byte]
    rows[1][0] = None  # prose after stage 1
    matrix = TransferMatrix(
        GOLDEN.stage_names, GOLDEN.domains, tuple(tuple(stage) for stage in rows), GOLDEN.learned_stage
    )
    undefined = {name for name, value in measure(matrix).items() if value.value is None}
    assert undefined == {"forgetting.max", "forgetting.max_incl_last"}
    assert forgetting_max(matrix).reason == "not measured in every stage it needs: prose"
    assert forgetting_max(matrix).domains == {"facts": 0.75, "code": 0.25}


def test_the_matrix_weighs_by_bytes_and_never_averages_document_means() -> None:
    ledger = Ledger((row(0, "prose", [(10.0, 1), (10.0, 99)]),))
    matrix = TransferMatrix.from_ledger(ledger, ["prose"], {})
    assert matrix.at(0, "prose") == 0.2  # the mean of document means would be 5.05


def test_the_matrix_orders_base_then_learned_by_stage_then_bystanders() -> None:
    names = ("chinese", "german", "code", "prose")
    rows = [row(stage, name, [(2.0 + stage, 2)]) for stage in range(3) for name in names]
    ledger = Ledger((*rows, row(2, "prose", [(9.0, 2)], step=50), row(2, "prose", [(1.0, 2)], step=90, split="test")))
    matrix = TransferMatrix.from_ledger(ledger, ["prose"], {"german": 2, "code": 1}, ["chinese", "prose"])
    assert matrix.domains == ("prose", "code", "german", "chinese")
    assert matrix.stage_names == ("name 0", "name 1", "name 2")
    assert matrix.learned_stage == {"prose": 0, "code": 1, "german": 2, "chinese": None}
    assert matrix.nll_per_byte[2] == (4.5, 2.0, 2.0, 2.0)
    assert TransferMatrix.from_ledger(ledger, ["prose"], {}, split="test").nll_per_byte == ((None,), (None,), (0.5,))


def test_a_domain_of_the_base_that_is_trained_again_counts_as_learned() -> None:
    ledger = Ledger(tuple(row(stage, "prose", [(4.0 - stage, 2)]) for stage in range(2)))
    matrix = TransferMatrix.from_ledger(ledger, ["prose"], {"prose": 1})
    assert matrix.domains == ("prose",) and learned(matrix).value == 0.5


def test_learning_in_a_stage_the_ledger_lacks_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"code.*3.*last stage is 0"):
        TransferMatrix.from_ledger(Ledger((row(0, "prose", [(1.0, 1)]),)), ["prose"], {"code": 3})


LOSSES = st.floats(0.01, 20.0)
DOCUMENTS = st.lists(st.tuples(LOSSES, st.integers(1, 500)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(LOSSES, st.integers(2, 5), st.integers(1, 4))
def test_a_constant_matrix_forgets_and_learns_exactly_nothing(loss: float, num_stages: int, num_old: int) -> None:
    domains = (*(f"old{number}" for number in range(num_old)), "new", "never")
    stages = {domain: 0 for domain in domains} | {"new": 1, "never": None}
    names = tuple(map(str, range(num_stages)))
    matrix = TransferMatrix(names, domains, ((loss,) * len(domains),) * num_stages, stages)
    values = measure(matrix)
    assert average(matrix).value == pytest.approx(loss)
    assert {value.value for name, value in values.items() if name != "average"} == {0.0}


@settings(deadline=None, max_examples=60)
@given(st.lists(DOCUMENTS, min_size=3, max_size=3), LOSSES, st.randoms(use_true_random=False))
def test_permuting_documents_and_domains_changes_no_metric(documents, factor, random) -> None:  # type: ignore[no-untyped-def]
    domains = ["prose", "facts", "code"]

    def matrix(data: dict[str, list[tuple[float, int]]], names: list[str]) -> TransferMatrix:
        rows = [
            row(stage, name, [(nats * (1 + stage * factor), size) for nats, size in data[name]])
            for stage in range(2)
            for name in names
        ]
        return TransferMatrix.from_ledger(Ledger(tuple(rows)), [name for name in names if name != "code"], {"code": 1})

    data = dict(zip(domains, documents, strict=True))
    shuffled = {name: random.sample(data[name], len(data[name])) for name in domains}
    a, b = measure(matrix(data, domains)), measure(matrix(shuffled, random.sample(domains, 3)))
    assert {name: value.value for name, value in a.items()} == {name: value.value for name, value in b.items()}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(LOSSES, min_size=4, max_size=4), min_size=2, max_size=5))
def test_the_named_variants_keep_their_order(rows: list[list[float]]) -> None:
    stages = {"a": 0, "b": 0, "c": 1, "d": None}
    matrix = TransferMatrix(tuple(map(str, range(len(rows)))), tuple("abcd"), tuple(map(tuple, rows)), stages)
    values = {name: value.value for name, value in measure(matrix).items()}
    first_last, gem = values["forgetting.first_last"], values["bwt.gem"]
    top, top_incl_last = values["forgetting.max"], values["forgetting.max_incl_last"]
    assert first_last is not None and gem is not None and top is not None and top_incl_last is not None
    assert gem == -first_last
    assert top_incl_last >= max(0.0, top) and top >= first_last


def test_every_metric_function_is_measured_under_a_name_of_its_own() -> None:
    assert len(measure(GOLDEN)) == len(METRICS)
