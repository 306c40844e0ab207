"""Measure a model on every domain of a run: rows for the ledger, usage and gates beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from mfext.config import Recipe
from mfext.config_evaluation import EvaluationConfig
from mfext.domains.domain import Domain, first_documents, split_hash
from mfext.domains.tokenizer import Tokenizer, encode_documents
from mfext.errors import InputError
from mfext.metrics.ledger import LedgerRow
from mfext.metrics.perplexity import Evaluation, Scoring, evaluate
from mfext.metrics.usage import UsageCounter
from mfext.model.language_model import LanguageModel
from mfext.report.terminal import Console
from mfext.store import Run, read_json_object


@dataclass(frozen=True)
class Column:
    """One domain's evaluation split, ready to score: token ids and UTF-8 bytes per document."""

    domain: str
    split: str
    documents: Sequence[list[int]]
    document_bytes: Sequence[int]
    sha256: str


@dataclass(frozen=True)
class Moment:
    """Which row of the matrix is measured."""

    stage: int
    stage_name: str
    step: int
    model_sha256: str
    seed: int


WITHIN = "within"
"""Name in the ledger of the start of each validation split, measured inside stages."""


def prepare_columns(
    domains: Iterable[Domain], tokenizer: Tokenizer, settings: EvaluationConfig, split: str | None = None
) -> tuple[Column, ...]:
    """The columns of the matrix; `split` in place of the settings' own. InputError where a domain has nothing there."""
    name = split or settings.split
    return tuple(_column(each, tokenizer, name, name, settings.max_bytes) for each in domains)


def prepare_within(domains: Iterable[Domain], tokenizer: Tokenizer, settings: EvaluationConfig) -> tuple[Column, ...]:
    """The smaller columns measured inside stages; none where the recipe does not ask for it."""
    if settings.within_every_steps is None:
        return ()
    return tuple(_column(each, tokenizer, "validation", WITHIN, settings.within_max_bytes) for each in domains)


def _column(domain: Domain, tokenizer: Tokenizer, split: str, name: str, max_bytes: int | None) -> Column:
    documents = first_documents(domain.split(split), max_bytes)
    if not documents:
        raise InputError(
            f"domain '{domain.name}' has no {split} documents",
            domain.source,
            "add some, or choose another split with evaluation.split",
        )
    ids, sizes = encode_documents(documents, tokenizer)
    return Column(domain.name, name, ids, sizes, split_hash(documents))


def measure(
    model: LanguageModel,
    columns: Sequence[Column],
    moment: Moment,
    settings: EvaluationConfig,
    say: Callable[[str], None],
) -> tuple[list[LedgerRow], dict[str, dict[str, object]]]:
    """Ledger rows of one stage, and per domain its expert usage and gate behaviour (plain JSON)."""
    scoring = Scoring(settings.window, settings.batch_size, model.config.bos_id, model.config.pad_id, model.device)
    base_experts = {"attention": model.config.attention_experts, "feedforward": model.config.feedforward_experts}
    rows, details = [], {}
    for column in columns:
        begun = time.monotonic()
        evaluation = evaluate(model, column.documents, column.document_bytes, scoring, usage=UsageCounter(base_experts))
        rows.append(_row(column, evaluation, moment, time.monotonic() - begun))
        details[column.domain] = _details(evaluation)
        say(f"{moment.stage_name}: {column.domain} {evaluation.bits_per_byte or 0:.3f} bits per byte")
    return rows, details


def measure_stage(
    model: LanguageModel, columns: Sequence[Column], moment: Moment, recipe: Recipe, opened: Run, console: Console
) -> None:
    """Append a stage's row to a run's ledger, and its usage and gates beside it; what is there stays."""
    missing = _unmeasured(columns, moment, opened)
    if not missing:
        return
    rows, details = measure(model, missing, moment, recipe.evaluation, console.say)
    name = f"details-{moment.stage:03d}.json"
    before = read_json_object(opened.path / name) if (opened.path / name).is_file() else {}
    opened.write_report_file(name, json.dumps({**before, **details}))
    opened.append_ledger([row.to_json() for row in rows])


def measure_within(
    model: LanguageModel, columns: Sequence[Column], moment: Moment, recipe: Recipe, opened: Run
) -> None:
    """Append the rows of one moment inside a stage (columns of `prepare_within`); what is there stays."""
    missing = _unmeasured(columns, moment, opened)
    if missing:
        rows, _ = measure(model, missing, moment, recipe.evaluation, lambda line: None)
        opened.append_ledger([row.to_json() for row in rows])


def _unmeasured(columns: Sequence[Column], moment: Moment, opened: Run) -> list[Column]:
    here = (moment.stage, moment.step)
    measured = {(row["domain"], row["split"]) for row in opened.read_ledger() if (row["stage"], row["step"]) == here}
    return [column for column in columns if (column.domain, column.split) not in measured]


def _row(column: Column, evaluation: Evaluation, moment: Moment, wall_s: float) -> LedgerRow:
    return LedgerRow(
        stage=moment.stage,
        step=moment.step,
        domain=column.domain,
        split=column.split,
        nll_nats=evaluation.nats,
        tokens=evaluation.tokens,
        bytes=evaluation.bytes,
        documents=len(column.documents),
        document_nats=evaluation.document_nats,
        document_bytes=tuple(column.document_bytes),
        split_sha256=column.sha256,
        model_sha256=moment.model_sha256,
        seed=moment.seed,
        wall_s=wall_s,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        stage_name=moment.stage_name,
    )


def _details(evaluation: Evaluation) -> dict[str, object]:
    gates: list[Mapping[str, object]] = []
    for gate in evaluation.gates:
        lag = {"lag_tokens_mean": gate.lag}
        gates.append({key: value for key, value in asdict(gate).items() if key != "document_lags"} | lag)
    return {"usage": evaluation.usage.to_json() if evaluation.usage else None, "gates": gates}
