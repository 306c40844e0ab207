"""The ledger keeps raw sums and refuses rows that contradict themselves or each other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from mfext.errors import InputError
from mfext.metrics.ledger import Ledger, LedgerRow, bits_per_byte, perplexity

ROW = LedgerRow(
    stage=0,
    step=0,
    domain="prose",
    split="validation",
    nll_nats=6.0,
    tokens=5,
    bytes=4,
    documents=2,
    document_nats=(4.0, 2.0),
    document_bytes=(3, 1),
    split_sha256="aa",
    model_sha256="bb",
    seed=1,
    wall_s=0.25,
    time="2026-01-01T00:00:00+00:00",
    stage_name="base",
)


def test_a_row_survives_json_unchanged() -> None:
    assert LedgerRow.from_json(json.loads(json.dumps(ROW.to_json()))) == ROW


def test_a_rows_means_are_weighted_by_bytes_and_tokens() -> None:
    assert ROW.nats_per_byte == 1.5
    assert ROW.bits_per_byte == pytest.approx(1.5 / math.log(2))
    assert ROW.perplexity == pytest.approx(math.exp(6 / 5))


def test_means_of_nothing_are_absent() -> None:
    empty = replace(ROW, nll_nats=0.0, tokens=0, bytes=0, documents=0, document_nats=(), document_bytes=())
    assert (empty.nats_per_byte, empty.bits_per_byte, empty.perplexity) == (None, None, None)
    assert bits_per_byte(1.0, 0) is None
    assert perplexity(1e6, 1) is None


@pytest.mark.parametrize(
    "change",
    [
        {"nll_nats": math.nan},
        {"nll_nats": 6.1},
        {"bytes": 5},
        {"documents": 3},
        {"tokens": -1},
        {"document_nats": (math.inf, 2.0), "nll_nats": math.inf},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ledger row of stage 0, domain 'prose'"):
        replace(ROW, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "0"},
        {"stage": True},
        {"stage": 1.5},
        {"domain": 3},
        {"document_nats": 6.0},
        {"document_bytes": [3.0, 1]},
    ],
)
def test_a_json_row_of_wrong_types_is_one_clear_error(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(change))}=.*is not of type.*restore"):
        LedgerRow.from_json({**ROW.to_json(), **change})


def test_a_json_row_with_missing_or_unknown_keys_names_them() -> None:
    line = ROW.to_json()
    line["extra"] = line.pop("seed")
    with pytest.raises(InputError, match="extra, seed"):
        LedgerRow.from_json(line)


def test_a_json_row_whose_sums_disagree_is_an_input_error() -> None:
    with pytest.raises(InputError, match="do not add up"):
        LedgerRow.from_json({**ROW.to_json(), "nll_nats": 7.0})


def test_two_rows_with_one_key_are_refused() -> None:
    with pytest.raises(InputError, match="one key"):
        Ledger((ROW, replace(ROW, wall_s=1.0)))


@pytest.mark.parametrize("change", [{"split_sha256": "cc"}, {"document_bytes": (2, 2)}])
def test_stages_measured_on_different_documents_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="different documents"):
        Ledger((ROW,)).add([replace(ROW, stage=1, **change)])


def test_the_ledger_finds_the_last_step_of_a_stage() -> None:
    late = replace(ROW, stage=1, step=20, stage_name="code")
    ledger = Ledger.from_json(row.to_json() for row in (ROW, late, replace(late, step=10)))
    assert len(ledger) == len(list(ledger)) == 3
    assert ledger.num_stages == 2
    assert ledger.at(1, "prose", "validation") == late
    assert ledger.at(1, "prose", "test") is None
    assert Ledger().num_stages == 0
