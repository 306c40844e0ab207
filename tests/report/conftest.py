"""A realistic result of growing: three old domains, one or two learned, two never trained."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

OLD = ("english_prose", "world_factbook", "us_regulations")
NEW = ("python_code", "bytecode")
NEVER = ("german_prose", "chinese_prose")
LN2 = math.log(2)
LAYERS = 3


@dataclass(frozen=True)
class Result:
    """The stable JSON and the raw extras of one run."""

    data: dict[str, Any]
    raw: dict[str, Any]


def _interval(bits: float, half: float) -> dict[str, Any]:
    return {"difference": bits * LN2, "low": (bits - half) * LN2, "high": (bits + half) * LN2}


def _banks(rng: random.Random, opened: tuple[float, ...], competing: int) -> list[dict[str, Any]]:
    banks = []
    for layer in range(LAYERS):
        for kind, count in (("attention", 6), ("feedforward", 8)):
            for generation, (size, reached) in enumerate([(count + competing, 1.0), *((4, share) for share in opened)]):
                weights = [rng.expovariate(1) for _ in range(size)]
                share = [weight / sum(weights) for weight in weights]
                banks.append(
                    {
                        "layer": layer,
                        "kind": kind,
                        "generation": generation,
                        "tokens": round(100_000 * reached),
                        "share": share,
                        "gate_mass": share,
                        "entropy_nats": 1.5,
                        "dead_experts": 0,
                        "share_new": reached if generation else 0.0,
                    }
                )
    return banks


def _details(rng: random.Random, opened: tuple[float, ...], compete: bool) -> dict[str, Any]:
    sites = [
        {"layer": layer, "kind": kind, "share_new": max(opened, default=0.9 if compete else 0.0)}
        for layer in range(LAYERS)
        for kind in ("attention", "feedforward")
    ]
    gates = [
        {"gate": index, "share_open": share, "share_not_full": 1 - 0.97 * share, "lag_tokens_mean": 3 + 20 * share}
        for index, share in enumerate(opened)
    ]
    return {
        "usage": {"tokens": 100_000, "banks": _banks(rng, opened, 4 if compete else 0), "sites": sites},
        "gates": gates,
    }


def _curve(rng: random.Random, start: float, end: float, gated: bool) -> list[dict[str, float]]:
    rows = []
    for step in range(10, 1001, 10):
        loss = end + (start - end) * math.exp(-step / 150) + rng.gauss(0, 0.02)
        row = {"step": float(step), "loss_nats_per_token": loss, "tokens_per_s": 5200.0, "learning_rate": 2e-3}
        if gated:
            row["gate_open_share"] = 1 - 0.1 * math.exp(-step / 90)
            row["new_expert_share"] = 0.97 - 0.2 * rng.random() / step
        rows.append(row)
    return rows


def _build(names: tuple[str, ...], forgotten: float, mode: str) -> Result:
    rng = random.Random(7)
    domains = (*OLD, *names, *NEVER)
    base = dict(zip((*OLD, *NEW, *NEVER), (2.31, 1.87, 1.52, 3.10, 4.46, 3.52, 5.21), strict=True))
    matrix = []
    for stage in range(len(names) + 1):
        gain = {name: base[name] * (0.5 if names.index(name) < stage else 0.99) for name in names} if stage else {}
        drift = {name: forgotten * stage * scale for name, scale in zip(OLD, (1.0, 0.4, 0.2), strict=True)}
        never = {name: 0.01 * stage for name in NEVER}
        moved = {**drift, **never}
        matrix.append([(gain.get(name, base[name]) + moved.get(name, 0.0)) * LN2 for name in domains])
    last = forgotten * len(names)
    half = 0.3 * abs(forgotten) + 0.001
    generation = {"mode": mode, "attention_experts": [4] * LAYERS, "feedforward_experts": [4] * LAYERS}
    first = {"stage": 0, "name": "base", "method": "pretrain", "domains": list(OLD), "tokens": 4_200_000}
    lineage: list[dict[str, Any]] = [{**first, "sha256": "ab" * 32}]
    for index, name in enumerate(names, 1):
        entry = {"stage": index, "name": name, "method": "grow", "domains": [name], "tokens": 1_200_000}
        lineage.append({**entry, "sha256": f"{index}c" * 32})
    stages = [
        {"index": 0, "name": "base", "method": "pretrain", "tokens": 4_200_000, "wall_s": 812.0},
        *({"index": i, "name": name, "tokens": 1_200_000, "wall_s": 231.0} for i, name in enumerate(names, 1)),
    ]
    mean = last * (1 + 0.4 + 0.2) / 3
    data: dict[str, Any] = {
        "mfext_version": "0.1.0",
        "seed": 1,
        "config_hash": "0123456789abcdef",
        "run": "runs/grow-python_code",
        "model": "runs/grow-python_code/stages/001-python_code",
        "method": "grow",
        "mode": mode,
        "domains": list(domains),
        "stages": stages,
        "matrix": {"nll_per_byte": matrix, "split": "validation"},
        "forgetting": {
            "domains": {
                name: _interval(last * scale, half * scale) for name, scale in zip(OLD, (1.0, 0.4, 0.2), strict=True)
            },
            "mean": _interval(mean, half * 0.5),
        },
        "bystanders": {
            "domains": {
                "german_prose": _interval(0.01 * len(names), 0.004),
                "chinese_prose": {**_interval(0.01 * len(names), 0), "low": None, "high": None, "reason": "1 document"},
            },
            "mean": _interval(0.01 * len(names), 0.002),
        },
        "learned": {
            name: {"before": matrix[index][len(OLD) + index], "after": matrix[index + 1][len(OLD) + index]}
            for index, name in enumerate(names)
        },
        "metrics": {
            "forgetting.base": {
                "value": mean * LN2,
                "reason": None,
                "direction": "lower is better",
                "unit": "nats per byte",
                "domains": {},
            },
            "bwt.gem": {
                "value": None,
                "reason": "no domain was learned before the last stage",
                "direction": "higher is better",
                "unit": "nats per byte",
                "domains": {},
            },
        },
        "params": {"total": 5_312_004, "trainable": 1_102_340, "active_per_token": 2_041_233, "added": 1_102_340},
        "frozen_ok": True,
        "detach_equals_base": True,
        "identity_at_growth": 0.0 if mode == "gated" else 0.31,
        "tokens": 1_200_000 * len(names),
        "wall_s": 231.4 * len(names),
        "tokens_per_s": 5186.0,
    }
    gated = mode == "gated"
    opened = {
        name: tuple(0.98 if name == other else 0.004 if name in OLD else 0.02 for other in names) for name in domains
    }
    raw: dict[str, Any] = {
        "curves": {
            "base": _curve(rng, 5.4, 1.5, False),
            **{name: _curve(rng, base[name] * LN2, base[name] * 0.5 * LN2, gated) for name in names},
        },
        "details": {
            "base": {},
            "last": {name: _details(rng, opened[name] if gated else (), not gated) for name in domains},
        },
        "facts": {
            name: {
                "split": "validation",
                "documents": 40,
                "bytes": 262_144,
                "tokens": 262_144,
                "split_sha256": "d4" * 32,
                "source": f"corpora/{name}",
            }
            for name in domains
        },
        "lineage": lineage,
        "generations": [{"name": name, **generation} for name in names],
        "environment": {"python": "3.11.9", "torch": "2.13.0", "CPU": "2 cores", "threads": "2"},
    }
    return Result(data, raw)


@pytest.fixture
def build_result() -> Callable[..., Result]:
    """Builds a result: build_result(learned=1 or 2 domains, forgotten=bits per byte and stage, mode=...)."""

    def build(learned: int = 1, forgotten: float = 0.004, mode: str = "gated") -> Result:
        return _build(NEW[:learned], forgotten, mode)

    return build
