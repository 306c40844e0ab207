"""Which experts a model uses on which domain: measured in one pass, then kept for whoever asks again.

A measurement is kept in the cache folder under the hash of all it follows from: the weights, the config (experts per
token, thresholds of gates), the text, the tokenizer and how the text was cut into windows. It may be deleted at any
time. Batch size, threads and device are not in that hash: they move a share by no more than rounding does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from mfext.commands.measuring import Column, prepare_columns
from mfext.commands.models import OpenedModel
from mfext.commands.setting import tokenizer_of
from mfext.config_evaluation import EvaluationConfig
from mfext.conversion import to_mapping
from mfext.domains.cache_file import publish
from mfext.domains.domain import Domain
from mfext.errors import InputError, MachineError
from mfext.metrics.perplexity import Scoring, evaluate
from mfext.metrics.usage import Usage, UsageCounter
from mfext.model.observing import observing
from mfext.paths import cache_folder
from mfext.report.quantities import size
from mfext.report.terminal import Console
from mfext.store import config_hash, dump_json, seal, unseal

FORMAT = "mfext-usage-1"


def usage_of(
    opened: OpenedModel,
    domains: Iterable[Domain],
    settings: EvaluationConfig,
    console: Console,
    tokenizer: str | None = None,
    split: str | None = None,
) -> dict[str, Usage]:
    """Usage with contributions per domain, on the split and as many bytes as `settings` say, where the model lies.

    `split` "train" measures what something is to be chosen by, which no number of a report may rest on.

    What was measured before is read back and the model not run: it must be the one that `opened.sha256` names.
    `tokenizer` None takes the folder's. Raises InputError for a dense model, a domain without text in that split, or a
    tokenizer that does not fit.
    """
    if opened.model.config.architecture == "dense":
        raise InputError("a dense model has no experts", opened.folder, "measure the usage of a ModuleFormer")
    reader = tokenizer_of(opened, tokenizer)
    found: dict[str, Usage] = {}
    for column in prepare_columns(domains, reader, settings, split):
        key = _key(opened, column, settings, reader.fingerprint)
        path = cache_folder() / "usage" / f"{hashlib.sha256(dump_json(key)).hexdigest()[:32]}.json"
        kept = _read(path, key)
        if kept is None:
            console.say(f"measuring expert usage on {column.domain}, {size(sum(column.document_bytes))}")
            kept = _measure(opened, column, settings)
            _keep(path, key, kept, console)
        found[column.domain] = kept
    return found


def _measure(opened: OpenedModel, column: Column, settings: EvaluationConfig) -> Usage:
    model, config = opened.model, opened.model.config
    scoring = Scoring(settings.window, settings.batch_size, config.bos_id, config.pad_id, model.device)
    counter = UsageCounter({"attention": config.attention_experts, "feedforward": config.feedforward_experts})
    with observing(model):
        evaluate(model, column.documents, column.document_bytes, scoring, usage=counter)
    return counter.usage()


def _key(opened: OpenedModel, column: Column, settings: EvaluationConfig, fingerprint: str) -> dict[str, object]:
    return {
        "format": FORMAT,
        "model_sha256": opened.sha256,
        "config_sha256": config_hash(to_mapping(opened.model.config)),
        "split": column.split,
        "split_sha256": column.sha256,
        "tokenizer": fingerprint,
        "window": settings.window,
        "max_bytes": settings.max_bytes,
    }


def _read(path: Path, key: dict[str, object]) -> Usage | None:
    """What is kept under `key`; None where nothing is, or a damaged file, which is then written anew."""
    try:
        kept = unseal(path.read_bytes(), path)
        usage = kept.get("usage")
        return Usage.from_json(usage, str(path)) if kept.get("key") == key and isinstance(usage, dict) else None
    except (OSError, InputError):
        return None


def _keep(path: Path, key: dict[str, object], usage: Usage, console: Console) -> None:
    content = seal({"key": key, "usage": usage.to_json()})

    def write(file: BinaryIO) -> None:
        file.write(content)

    try:
        publish(path, write)
    except MachineError as error:
        console.warn(f"the measurement is not kept: {error}")
