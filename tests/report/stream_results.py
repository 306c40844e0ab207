"""Made-up results of streams as real ones look: four domains in a row from random weights, ten methods, three seeds."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

LN2 = math.log(2)
STREAM = ("english_prose", "python_code", "german_prose", "math_word_problems")
NEVER = ("us_regulations", "c_code", "chinese_prose")
DOMAINS = (*STREAM, *NEVER)
UNTRAINED = 8.02
# Bits per byte on a domain right after its stage by full fine-tuning, and before it.
BEST = {"english_prose": 2.16, "python_code": 2.02, "german_prose": 2.23, "math_word_problems": 1.84}
BEFORE = {"python_code": 4.96, "german_prose": 5.44, "math_word_problems": 3.74}
NEVER_AT = {"us_regulations": 2.91, "c_code": 6.09, "chinese_prose": 8.27}
# Method -> (mean forgetting, loss after learning against full's, drift of what is never trained, million parameters).
METHODS = {
    "grow": (0.006, 1.021, 0.002, 5.31),
    "full": (1.24, 1.0, 0.9, 3.21),
    "replay": (0.31, 1.012, 0.4, 3.21),
    "ewc": (0.74, 1.09, 0.6, 3.21),
    "lwf": (0.52, 1.06, 0.5, 3.21),
    "lora": (0.91, 1.11, 0.7, 3.62),
    "expand": (0.88, 1.04, 0.6, 4.9),
    "frozen": (0.0, 2.0, 0.0, 3.21),
    "joint": (0.02, 1.005, 0.1, 3.21),
    "independent": (0.0, 1.002, 0.0, 12.84),
}


def stream_data(method: str = "grow", seed: int = 1) -> dict[str, Any]:
    """The stable JSON of one continual run from random weights."""
    forgets, gap, drift, million = METHODS[method]
    rng = random.Random(f"{method}{seed}")
    noise = {name: 1 + rng.gauss(0, 0.004) for name in DOMAINS}
    forgets *= 1 + rng.gauss(0, 0.12)
    rows = [[(UNTRAINED + rng.gauss(0, 0.01)) * LN2 for _ in DOMAINS]]
    for stage in range(1, len(STREAM) + 1):
        row = []
        for column, name in enumerate(DOMAINS):
            if name in NEVER:
                loss = NEVER_AT[name] * noise[name] + drift * (stage - 1) / 3
            elif column < stage:
                reached = BEST[name] * (gap if column else 1.0)
                loss = reached * noise[name] + forgets * 2 * (stage - 1 - column) / 3
            else:
                loss = BEFORE[name] * noise[name]
            row.append(loss * LN2)
        rows.append(row)
    old = {name: _change(rows[-1][i] - rows[i + 1][i], 0.1 * forgets + 0.0008) for i, name in enumerate(STREAM[:-1])}
    never = {name: _change(rows[-1][4 + i] - rows[1][4 + i], 0.002) for i, name in enumerate(NEVER)}
    stages = [{"index": 0, "name": "random", "method": "random"}]
    for index, name in enumerate(STREAM, 1):
        spent = {"tokens": 6_000_000 if index == 1 else 1_200_000, "wall_s": 812.0 if index == 1 else 231.0}
        sizes = {"total": round(million * 1e6), "trainable": 1_102_340, "peak_bytes": 1.1e9}
        stages.append({"index": index, "name": name, "method": method, "domains": [name], **spent, **sizes})
    return {
        "mfext_version": "0.1.0",
        "seed": seed,
        "config_hash": "0123456789abcdef",
        "run": f"runs/{method}-{seed}",
        "model": f"runs/{method}-{seed}/004-math_word_problems",
        "method": method,
        "mode": "gated" if method == "grow" else None,
        "finished": True,
        "domains": list(DOMAINS),
        "stages": stages,
        "matrix": {"nll_per_byte": rows, "split": "validation"},
        "forgetting": {"domains": old, "mean": _mean(old)},
        "bystanders": {"domains": never, "mean": _mean(never)},
        "learned": {
            name: {"before": rows[i][i], "after": rows[i + 1][i], **_change(rows[i + 1][i] - rows[i][i], 0.02)}
            for i, name in enumerate(STREAM)
        },
        "metrics": {},
        "params": {"total": million * 1e6, "trainable": 1_102_340, "active_per_token": 2_041_233, "added": 1_102_340},
        "frozen_ok": True if method == "grow" else None,
        "detach_equals_base": True if method == "grow" else None,
        "identity_at_growth": 0.0 if method == "grow" else None,
        "tokens": 1_200_000,
        "wall_s": 231.0,
        "tokens_per_s": 5195.0,
    }


def within_of(data: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Evaluations inside the stages, as the data key `within` holds them: every 100 of 500 steps."""
    rows = data["matrix"]["nll_per_byte"]
    found: dict[str, list[list[float]]] = {name: [] for name in data["domains"]}
    for stage, (before, after) in enumerate(pairwise(rows)):
        for step in range(0, 501, 50):
            for name, a, b in zip(data["domains"], before, after, strict=True):
                bump = 0.12 * math.exp(-(((step - 120) / 80) ** 2)) if stage else 0.0
                found[name].append(
                    [float(500 * stage + step), b + (a - b) * math.exp(-step / 70) + bump * (a - b == 0)]
                )
    return found


def sweep_data(methods: tuple[str, ...] = tuple(METHODS), seeds: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """A sweep as the sweep's own command describes it; the last method's last trials failed and wait."""
    trials: list[dict[str, Any]] = []
    for method in methods:
        for seed in seeds:
            trial = {"id": f"{len(trials):02d}a7c3e9f1b2d4", "overrides": {"method": method, "seed": seed}}
            made = {"state": "done", "run": f"trials/{trial['id']}", "data": stream_data(method, seed), "error": None}
            trials.append({**trial, **made})
    axes = {"method": list(methods), "seed": list(seeds)}
    return {"sweep": "runs/stream_corpora", "verb": "continual", "axes": axes, "trials": trials, "seed": None}


def fail(data: dict[str, Any], place: int, error: str) -> None:
    """Make a trial one that failed."""
    data["trials"][place] |= {"state": "failed", "data": None, "error": error}


def _change(nats: float, half_bits: float) -> dict[str, float]:
    return {"difference": nats, "low": nats - half_bits * LN2, "high": nats + half_bits * LN2}


def _mean(changes: dict[str, dict[str, float]]) -> dict[str, float]:
    return {key: sum(each[key] for each in changes.values()) / len(changes) for key in ("difference", "low", "high")}
