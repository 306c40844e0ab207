"""`mfext eval`: a model on domains -> losses, expert usage, gates."""

from __future__ import annotations

from collections.abc import Mapping

from mfext.commands.measuring import Moment, measure, prepare_columns
from mfext.commands.models import open_model
from mfext.commands.setting import load_domains, prepare_machine
from mfext.domains.tokenizer import check_tokenizer, load_tokenizer
from mfext.metrics.ledger import LedgerRow
from mfext.report.report import Report
from mfext.report.sections import evaluation_report
from mfext.report.terminal import Console
from mfext.requests import EvalRequest, Invocation


def run(request: EvalRequest, invocation: Invocation) -> Report:
    """Losses of `request.model` on each domain's evaluation split, with usage and gate behaviour."""
    console = Console.of(invocation)
    device = prepare_machine(invocation)
    opened = open_model(request.model)
    model = opened.model.to(device)
    tokenizer = load_tokenizer(request.tokenizer or tokenizer_named(opened.metadata))
    check_tokenizer(tokenizer, model.config.vocab_size)
    domains = load_domains(request.domains, console)
    columns = prepare_columns(domains, tokenizer, request.evaluation)
    moment = Moment(0, opened.folder.name, 0, opened.sha256, request.seed)
    rows, details = measure(model, columns, moment, request.evaluation, console.say)
    data: dict[str, object] = {
        "model": str(opened.folder),
        "model_sha256": opened.sha256,
        "split": request.evaluation.split,
        "domains": {row.domain: _entry(row, details[row.domain]) for row in rows},
        "usage": {name: detail["usage"] for name, detail in details.items()},
    }
    return evaluation_report(data)


def tokenizer_named(metadata: Mapping[str, object]) -> str:
    """The tokenizer a model folder records; bytes where it records none."""
    named = metadata.get("tokenizer")
    return named if isinstance(named, str) else "bytes"


def _entry(row: LedgerRow, details: Mapping[str, object]) -> dict[str, object]:
    return {
        "nll_nats": row.nll_nats,
        "tokens": row.tokens,
        "bytes": row.bytes,
        "documents": row.documents,
        "bits_per_byte": row.bits_per_byte,
        "perplexity": row.perplexity,
        "gates": details["gates"],
    }
