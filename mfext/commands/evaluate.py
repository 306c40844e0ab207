"""`mfext eval`: a model on domains -> losses, expert usage, gates; with --switch also where documents change domain."""

from __future__ import annotations

from collections.abc import Mapping

from mfext.commands.gate_budgets import gate_budgets
from mfext.commands.measuring import Moment, measure, prepare_columns
from mfext.commands.models import open_model
from mfext.commands.setting import load_domains, prepare_machine, tokenizer_of
from mfext.commands.switching import measure_switching
from mfext.conversion import to_mapping
from mfext.metrics.ledger import LedgerRow
from mfext.report.report import Report
from mfext.report.sections import evaluation_report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, EvalRequest, Invocation


def run(request: EvalRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Losses of `request.model` on each domain's evaluation split, with usage and gate behaviour."""
    console = Console.of(invocation)
    device = prepare_machine(invocation)
    opened = open_model(request.model)
    model = opened.model.to(device)
    tokenizer = tokenizer_of(opened, request.tokenizer)
    domains = load_domains(request.domains, console)
    columns = prepare_columns(domains, tokenizer, request.evaluation)
    moment = Moment(0, opened.folder.name, 0, opened.sha256, request.seed)
    rows, details = measure(model, columns, moment, request.evaluation, console.say)
    entries = {row.domain: _entry(row, details[row.domain]) for row in rows}
    data: dict[str, object] = {
        "generations": to_mapping(model.config)["generations"],
        "model": str(opened.folder),
        "model_sha256": opened.sha256,
        "split": request.evaluation.split,
        "domains": entries,
        "usage": {name: detail["usage"] for name, detail in details.items()},
        "gates": gate_budgets(model.config, opened.metadata, entries),
    }
    if request.switch.on:
        data |= measure_switching(opened, domains, tokenizer, request, console)
    return evaluation_report(data)


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
