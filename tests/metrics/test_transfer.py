"""Every metric against hand-made matrices, one per convention, and properties that hold for all matrices."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.errors import InputError
from mfext.metrics.forgetting import bwt_pairs, forgetting_max
from mfext.metrics.learning import (
    References,
    average_incremental,
    fwt_gem,
    fwt_raw,
    fwt_vs_independent,
    intransigence_joint,
    learned,
)
from mfext.metrics.ledger import Ledger
from mfext.metrics.transfer import METRICS, REFERENCE_METRICS, measure
from mfext.metrics.transfer_matrix import TransferMatrix
from tests.metrics.rows import row

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
REFERENCES = References(joint={"code": 1.25, "german": 2.25}, independent={"code": 1.75, "german": 2.5, "prose": 9.0})
# prose: last 2.25, learned 2.0, best before 2.0. facts: 3.5, 3.0, 2.75. code: 1.75, 1.5, 1.5.
EXPECTED = {
    "forgetting.base": ((0.25 + 0.5) / 2, "lower is better"),
    "forgetting.first_last": ((0.25 + 0.5 + 0.25) / 3, "lower is better"),
    "forgetting.max": ((0.25 + 0.75 + 0.25) / 3, "lower is better"),
    "forgetting.max_incl_last": ((0.25 + 0.75 + 0.25) / 3, "lower is better"),
    "bwt.gem": (-(0.25 + 0.5 + 0.25) / 3, "higher is better"),
    "bwt.pairs": (-(0.5 + 0.25 - 0.25 + 0.5 + 0.25) / 5, "higher is better"),
    "fwt.gem": (0.5, "higher is better"),
    "fwt.raw": (5.5, "lower is better"),
    "fwt.vs_independent": (0.5, "higher is better"),
    "intransigence.joint": ((0.25 - 0.25) / 2, "lower is better"),
    "intransigence.independent": ((-0.25 - 0.5) / 2, "lower is better"),
    "learned": ((3.5 + 3.5) / 2, "higher is better"),
    "bystander": (1.0, "lower is better"),
    "average": ((2.25 + 3.5 + 1.75 + 2.0) / 4, "lower is better"),
    "average_incremental": ((2.5 + 6.75 / 3 + 9.5 / 4) / 3, "lower is better"),
}


def test_every_metric_has_its_golden_value_and_direction() -> None:
    values = measure(GOLDEN, REFERENCES)
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
    assert (values.pop("average").value, values.pop("average_incremental").value) == (2.0, 2.0)
    assert [value.value for value in values.values()] == [None] * 13
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
    undefined = {name for name, value in measure(matrix, REFERENCES).items() if value.value is None}
    assert undefined == {"forgetting.max", "forgetting.max_incl_last", "bwt.pairs", "average_incremental"}
    assert average_incremental(matrix).reason == "not measured in every stage it needs: stage 1"
    assert bwt_pairs(matrix).reason == "not measured in every stage it needs: prose after stage 1"
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


def test_metrics_against_a_reference_say_which_run_or_domain_is_missing() -> None:
    values = measure(GOLDEN)
    assert values["intransigence.joint"].reason == "needs the losses of the joint run"
    assert values["intransigence.independent"].reason == "needs the losses of the independent run"
    assert values["fwt.vs_independent"].reason == "needs the losses of the independent run"
    partial = intransigence_joint(GOLDEN, References(joint={"code": 1.25}))
    assert partial.reason == "not measured in this run or in the joint run: german"
    assert partial.domains == {"code": 0.25}


def test_without_a_second_new_domain_nothing_could_be_transferred_forward() -> None:
    matrix = TransferMatrix(("base", "code"), ("prose", "code"), ((2.0, 5.0), (2.0, 3.0)), {"prose": 0, "code": 1})
    values = measure(matrix, REFERENCES)
    assert {values[name].reason for name in ("fwt.gem", "fwt.raw", "fwt.vs_independent")} == {
        "no domain was first trained after stage 1"
    }
    assert values["intransigence.joint"].value == 1.75


def test_a_repeated_domain_is_learned_in_its_latest_stage_and_zero_shot_before_its_first() -> None:
    losses = {"prose": (2.0, 2.0, 2.0, 2.0), "code": (5.0, 3.0, 3.5, 2.5), "german": (6.0, 5.0, 4.0, 4.5)}
    rows = [row(stage, name, [(loss, 1)]) for name, each in losses.items() for stage, loss in enumerate(each)]
    matrix = TransferMatrix.from_ledger(Ledger(tuple(rows)), ["prose"], {"code": (1, 3), "german": 2})
    assert matrix.learned_stage == {"prose": 0, "german": 2, "code": 3}
    assert matrix.first_trained == {"code": 1} and matrix.old_domains() == ("prose", "german")
    assert learned(matrix).domains == {"german": 1.0, "code": 1.0}
    assert fwt_gem(matrix).domains == {"german": 1.0}  # code was first trained in stage 1
    assert average_incremental(matrix).domains == {
        "stage 0": 2.0,
        "stage 1": (2.0 + 3.0) / 2,
        "stage 2": (2.0 + 3.5 + 4.0) / 3,
        "stage 3": (2.0 + 2.5 + 4.5) / 3,
    }


def test_forward_transfer_of_a_repeated_domain_looks_at_its_first_training_only() -> None:
    losses = ((4.0, 9.0), (3.0, 8.0), (3.5, 2.0), (2.5, 2.5), (2.75, 1.0))
    matrix = TransferMatrix(tuple("01234"), ("a", "b"), losses, {"a": 3, "b": 4}, {"a": 1, "b": 2})
    assert (fwt_gem(matrix).domains, fwt_raw(matrix).domains) == ({"b": 1.0}, {"b": 8.0})
    assert fwt_vs_independent(matrix, References(independent={"b": 3.0})).domains == {"b": 1.0}


def test_a_stage_still_in_training_adds_no_row_to_the_matrix() -> None:
    ledger = Ledger((row(0, "prose", [(2.0, 1)]), row(1, "prose", [(3.0, 1)], step=50, split="within")))
    assert TransferMatrix.from_ledger(ledger, ["prose"], {}).nll_per_byte == ((2.0,),)


LOSSES = st.floats(0.01, 20.0)
DOCUMENTS = st.lists(st.tuples(LOSSES, st.integers(1, 500)), min_size=1, max_size=6)
LEVELS = {"average", "average_incremental", "fwt.raw"}


@settings(deadline=None, max_examples=60)
@given(LOSSES, st.integers(3, 6), st.integers(1, 4))
def test_a_constant_matrix_forgets_learns_and_transfers_exactly_nothing(loss: float, num_stages: int, old: int) -> None:
    stages: dict[str, int | None] = {f"old{number}": 0 for number in range(old)}
    stages |= {"new": 1, "newer": 2, "never": None}
    rows = ((loss,) * len(stages),) * num_stages
    matrix = TransferMatrix(tuple(map(str, range(num_stages))), tuple(stages), rows, stages)
    values = measure(matrix, References(*({"new": loss, "newer": loss},) * 2))
    assert all(values.pop(name).value == pytest.approx(loss) for name in LEVELS)
    assert {value.value for value in values.values()} == {0.0}


@settings(deadline=None, max_examples=60)
@given(st.lists(DOCUMENTS, min_size=4, max_size=4), LOSSES, st.randoms(use_true_random=False))
def test_permuting_documents_and_renaming_and_permuting_domains_change_no_metric(documents, factor, random) -> None:
    domains = ["prose", "facts", "code", "german"]
    new = {"code": 1, "german": 2}

    def values(data: dict[str, list[tuple[float, int]]], order: list[str], prefix: str) -> dict[str, float | None]:
        rows = [
            row(stage, prefix + name, [(nats * (1 + stage * factor), size) for nats, size in data[name]])
            for stage in range(3)
            for name in order
        ]
        learned = {prefix + name: stage for name, stage in new.items()}
        base = [prefix + name for name in order if name not in new]
        matrix = TransferMatrix.from_ledger(Ledger(tuple(rows)), base, learned)
        reference = {prefix + "code": 1.5, prefix + "german": 2.5}
        return {name: value.value for name, value in measure(matrix, References(reference, reference)).items()}

    data = dict(zip(domains, documents, strict=True))
    shuffled = {name: random.sample(data[name], len(data[name])) for name in domains}
    first = values(data, domains, "")
    assert first == values(shuffled, random.sample(domains, 4), "renamed ")
    assert {name for name, value in first.items() if value is None} == {"bystander"}


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
    assert len(measure(GOLDEN)) == len(METRICS) + len(REFERENCE_METRICS)
