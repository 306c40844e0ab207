"""`mfext inspect`: what a model is made of: layers, generations, parameters by part, lineage, sizes.

With domains also what its experts do on them. Writes no more than the page that --out names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from mfext.commands.models import OpenedModel, open_model
from mfext.commands.setting import load_domains, prepare_machine, tokenizer_named
from mfext.commands.usage import usage_of
from mfext.config import GenerationConfig, ModelConfig
from mfext.conversion import to_mapping
from mfext.growth.plan import count_parameters
from mfext.metrics.overlap import overlap
from mfext.report.anatomy import inspection_report
from mfext.report.html import to_html
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, InspectRequest, Invocation
from mfext.store import is_run_folder, write_file_atomically

BASE = "base"


def run(request: InspectRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """What a model folder, the last stage of a run folder, or a published MoLM folder holds."""
    asked = Path(request.model).expanduser()
    opened = open_model(asked)
    config, metadata = opened.model.config, opened.metadata
    lineage, domains = metadata.get("lineage", []), metadata.get("domains", [])
    dtype = str(next(opened.model.parameters()).dtype).removeprefix("torch.")
    data: dict[str, object] = {
        "run": str(asked) if is_run_folder(asked) else None,
        "model": str(opened.folder),
        "model_sha256": opened.sha256,
        "source": metadata.get("source", "mfext"),
        "tokenizer": tokenizer_named(metadata),
        "dtype": dtype,
        "weights": opened.weights or dtype,
        "size_bytes": sum(path.stat().st_size for path in opened.folder.iterdir() if path.is_file()),
        "config": {key: value for key, value in to_mapping(config).items() if key != "generations"},
        "generations": _generations(config),
        "sites": _sites(config),
        "params": _parameters(opened),
        "domains": domains if isinstance(domains, list) else [],
        "lineage": lineage if isinstance(lineage, list) else [],
    }
    if request.domains:
        data |= _measured(request, opened, invocation)
    report = inspection_report(data)
    if request.out is not None:
        write_file_atomically(Path(request.out).expanduser(), to_html(report).encode("utf-8"))
    return report


def _measured(request: InspectRequest, opened: OpenedModel, invocation: Invocation) -> dict[str, object]:
    """`usage`: domain -> its expert usage; `overlap`: every domain against every other, in the order asked."""
    console = Console.of(invocation)
    opened.model.to(prepare_machine(invocation))
    domains = load_domains(request.domains, console)
    usages = usage_of(opened, domains, request.evaluation, console, request.tokenizer)
    found = [[overlap(here, there) for there in usages.values()] for here in usages.values()]
    return {
        "split": request.evaluation.split,
        "usage": {name: usage.to_json() for name, usage in usages.items()},
        "overlap": {
            "domains": list(usages),
            "cosine": [[each.cosine for each in row] for row in found],
            "divergence_nats": [[each.divergence_nats for each in row] for row in found],
        },
    }


def _generations(config: ModelConfig) -> list[dict[str, object]]:
    """Every generation with what it adds: parameters, and how many of them one token uses while its gate is open."""
    described = []
    before = count_parameters(replace(config, generations=()))
    for index, generation in enumerate(config.generations, 1):
        after = count_parameters(replace(config, generations=config.generations[:index]))
        sizes = {"params": after.total - before.total}
        sizes["active_per_token"] = after.active_per_token - before.active_per_token
        described.append({**_plain(generation), **sizes})
        before = after
    return described


def _plain(generation: GenerationConfig) -> dict[str, object]:
    values = asdict(generation)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _sites(config: ModelConfig) -> list[dict[str, object]]:
    """Experts of every site (layer and kind), those of the base first, then of every generation in order."""
    return [
        {
            "layer": layer,
            "kind": kind,
            "experts": [config.experts(kind, layer), *(each.experts(kind, layer) for each in config.generations)],
            "per_token": config.experts_per_token(kind),
        }
        for layer in range(config.num_layers)
        for kind in ("attention", "feedforward")
    ]


def _parameters(opened: OpenedModel) -> dict[str, object]:
    config = opened.model.config
    counts = count_parameters(config)
    owners = [BASE, *(generation.name for generation in config.generations)]
    parts: list[Counter[str]] = [Counter() for _ in owners]
    for name, parameter in opened.model.named_parameters():
        words = name.split(".")
        owner = int(words[1]) + 1 if words[0] == "generations" else 0
        parts[owner][_part(words, config)] += parameter.numel()
    by_owner: list[Mapping[str, object]] = [
        {"name": owner, "total": sum(part.values()), "parts": dict(part)}
        for owner, part in zip(owners, parts, strict=True)
    ]
    return {"total": counts.total, "active_per_token": counts.active_per_token, "by_generation": by_owner}


def _part(words: list[str], config: ModelConfig) -> str:
    """Which part of the model a parameter's name belongs to."""
    if config.architecture == "dense" and not words[-2].endswith("norm"):
        return next((word for word in ("attention", "feedforward", "embedding") if word in words), "head")
    if "gate" in words:
        return "domain gate"
    if any(word.endswith("router") for word in words):
        return "routers"
    if any(word.endswith("norm") for word in words):
        return "norms"
    for word, part in (("key", "keys and values"), ("value", "keys and values"), ("attention", "attention experts")):
        if word in words:
            return part
    if "feedforward" in words:
        return "feedforward experts"
    return "embedding" if "embedding" in words else "head"
