"""`mfext quantize`: the same model in a smaller folder, matrices as int8 or bfloat16, and what that costs, measured.

model -> matrices narrowed -> widened again, as every opening will -> measured before and after -> committed

Storage only: whoever opens the folder gets float32, the same bits each time, and may evaluate, prune or grow it like
any model. It is another model than the one it came from, by as much as was rounded. What `frozen` promises counts from
here on: growing on it proves that its widened weights stay as they are, and detaching gives those back, not the ones
before them. Domain gates stay float32: on the same text they open exactly where they did.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mfext import __version__
from mfext.commands.course import free_folder
from mfext.commands.measuring import Column, Moment, measure, prepare_columns
from mfext.commands.models import OpenedModel, build_model, model_tensors, open_model
from mfext.commands.setting import lineage_with, load_domains, prepare_machine, tokenizer_of
from mfext.conversion import to_mapping
from mfext.errors import InputError
from mfext.metrics.bootstrap import Interval, PairedDocuments, mean_interval, pair_rows, paired_interval
from mfext.metrics.ledger import LedgerRow
from mfext.model.generation import gate_names
from mfext.report.quantized import quantize_report
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, Invocation, QuantizeRequest
from mfext.store import (
    WEIGHTS_KEY,
    is_run_folder,
    model_hash,
    narrow_weights,
    read_manifest,
    require_replaceable,
    save_model,
    tensors_size_bytes,
    widen_weights,
)
from mfext.store_folders import MANIFEST_NAME

TOKENIZER = "tokenizer.json"
CARRIED_METADATA = ("domains", "tokenizer", "source")
METRICS, LEDGER = "metrics", "ledger"
"""JSON files of the folder: what is reported, and the rows it was worked out from (stage 0 is before)."""


def run(request: QuantizeRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Write the smaller model to `request.out`; a dry run measures and writes nothing.

    Raises InputError where the model is stored in fewer bits already, the folder cannot be written, or torchao is
    missing for int8.
    """
    console = Console.of(invocation)
    device = prepare_machine(invocation)
    opened = open_model(request.model)
    if opened.weights is not None:
        raise InputError(f"already stored as {opened.weights}", opened.folder, "quantize the model it was made from")
    out = _out_folder(request, opened)
    columns: tuple[Column, ...] = ()
    if request.domains and not invocation.dry_run:
        domains = load_domains(request.domains, console)
        columns = prepare_columns(domains, tokenizer_of(opened, request.tokenizer), request.evaluation)
    whole = model_tensors(opened.model)
    # Routers are narrowed too: in float32 they took 9 % more bytes, and no loss measured told them apart (2026-11-26).
    stored = narrow_weights(whole, request.to, gate_names(whole))
    widened = widen_weights(stored, opened.folder)
    sha256 = model_hash(widened)
    smaller = replace(opened, model=build_model(opened.model.config, widened, opened.folder), sha256=sha256)
    rows = []
    for stage, (name, each) in enumerate((("before", opened), ("after", smaller))):
        each.model.to(device)
        moment = Moment(stage, name, 0, each.sha256, request.seed)
        rows.append(measure(each.model, columns, moment, request.evaluation, console.say)[0])
    data: dict[str, object] = {
        "mfext_version": __version__,
        "seed": request.seed,
        "model": str(out),
        "model_sha256": sha256,
        "from": str(opened.folder),
        "from_sha256": opened.sha256,
        "weights": request.to,
        "split": request.evaluation.split,
        "before": {"weights_bytes": tensors_size_bytes(whole)},
        "after": {"weights_bytes": tensors_size_bytes(stored)},
        **_losses(rows[0], rows[1], request),
    }
    if invocation.dry_run:
        return quantize_report({"dry_run": True, **data})
    extra: dict[str, object] = {**_carried(opened), METRICS: data}
    if columns:
        extra[LEDGER] = {"rows": [row.to_json() for row in (*rows[0], *rows[1])]}
    config = {**to_mapping(smaller.model.config), WEIGHTS_KEY: request.to}
    save_model(stored, config, out, _metadata(request, opened, sha256), extra)
    assert open_model(out).sha256 == sha256, "what was measured is what was stored"
    return quantize_report(_with_disk(data, opened.folder, out))


def _out_folder(request: QuantizeRequest, opened: OpenedModel) -> Path:
    """Where the smaller model goes. InputError where it would replace its original, or what is no model."""
    if request.out is None:
        return free_folder(f"{request.to}-{Path(request.model).expanduser().resolve().name}")
    out = Path(request.out).expanduser()
    if out.resolve() == opened.folder.resolve():
        raise InputError("the model itself", f"--out {request.out}", "choose another folder: nothing undoes rounding")
    if is_run_folder(out):
        raise InputError("a run folder", f"--out {request.out}", "choose a folder that is missing or empty")
    require_replaceable(out, "model")
    return out


def _losses(before: Sequence[LedgerRow], after: Sequence[LedgerRow], request: QuantizeRequest) -> dict[str, object]:
    """`domains`: before, after, and their difference with its interval, nats per byte; `mean` over the domains."""
    samples = request.evaluation.bootstrap_samples
    pairs = [pair_rows(*rows) for rows in zip(before, after, strict=True)]

    def entry(rows: tuple[LedgerRow, LedgerRow], pair: PairedDocuments) -> dict[str, object]:
        found = paired_interval(pair.nats_a, pair.nats_b, pair.bytes, samples=samples, seed=request.seed)
        sizes = {"documents": rows[0].documents, "bytes": rows[0].bytes}
        return {"before": rows[0].nats_per_byte, "after": rows[1].nats_per_byte, **_interval(found), **sizes}

    domains = {
        rows[0].domain: entry(rows, pair) for rows, pair in zip(zip(before, after, strict=True), pairs, strict=True)
    }
    return {"domains": domains, "mean": _interval(mean_interval(pairs, samples=samples, seed=request.seed))}


def _interval(found: Interval) -> dict[str, object]:
    entry: dict[str, object] = {"difference": found.difference, "low": found.low, "high": found.high}
    return entry if found.reason is None else {**entry, "reason": found.reason}


def _carried(opened: OpenedModel) -> dict[str, object]:
    """A tokenizer beside the weights stays beside them."""
    path = opened.folder / TOKENIZER
    return {TOKENIZER: path.read_bytes()} if path.is_file() else {}


def _metadata(request: QuantizeRequest, opened: OpenedModel, sha256: str) -> dict[str, object]:
    facts: dict[str, object] = {"method": "quantize", "weights": request.to, "from_sha256": opened.sha256}
    entry = {"name": request.to, "domains": [], "sha256": sha256, **facts}
    has_manifest = (opened.folder / MANIFEST_NAME).is_file()
    parent = {"parent": read_manifest(opened.folder).identity} if has_manifest else {}
    return {
        **{key: opened.metadata[key] for key in CARRIED_METADATA if key in opened.metadata},
        **parent,
        "lineage": lineage_with(opened.metadata, entry),
        "seed": request.seed,
        "mfext_version": __version__,
        "facts": facts,
    }


def _with_disk(data: Mapping[str, object], *folders: Path) -> dict[str, object]:
    """The same with what each folder takes on disk, its report included."""
    found = dict(data)
    for key, folder in zip(("before", "after"), folders, strict=True):
        sizes = found[key]
        assert isinstance(sizes, dict)
        found[key] = {**sizes, "disk_bytes": sum(path.stat().st_size for path in os.scandir(folder) if path.is_file())}
    return found
