"""`mfext bench`: this machine's speed and memory, against dense transformers and against the plain formulation.

kernels right? -> train steps, ops, growth step and decoding in turns -> peak memory, each in a process of its own
    -> targets, hit or missed -> report

Under a minute at the default size. One thread unless `--threads` says otherwise, CPU time, medians, ratios within one
process. A checkout's `make bench` measures more shapes, and against the published formulation.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mfext.commands.rivals import (
    CONFIG_S,
    NEW_IN_THE_SOFTMAX,
    attention,
    decode,
    dense_rival,
    expert_layer,
    growth_steps,
    peak_train_bytes,
    train_step,
)
from mfext.config import ModelConfig
from mfext.errors import InputError, MachineError
from mfext.metrics.speed import TIMER, Figure, Run, blas, commit_of, interleaved_ms, processor
from mfext.model.build import new_model
from mfext.report.report import KeyValues, Report, Section, Table
from mfext.report.terminal import Console
from mfext.requests import DEFAULT_INVOCATION, BenchRequest, Invocation
from mfext_kernels import products
from mfext_kernels.checks import self_check

ACTIVE_AT_MOST, TOTAL_AT_LEAST, GROWTH_AT_MOST = 1.3, 2.5, 0.75
SOFTMAX_AT_MOST, EXPERTS_AT_MOST, PLAIN_AT_LEAST = 1.3, 1.25, 1.0
NAMES = ("ours", "dense_active", "dense_total")


@dataclass(frozen=True)
class Shape:
    """How much is measured: `batch` x `length` tokens a train step, `attended` (B, T) and `rows` for single ops."""

    config: ModelConfig
    batch: int
    length: int
    attended: tuple[int, int]
    experts: int
    rows: int
    prompt: int
    decoded: int


SHAPES = {
    "small": Shape(CONFIG_S, 8, 256, (2, 512), 32, 4096, 128, 16),
    "tiny": Shape(
        replace(CONFIG_S, d_model=32, num_layers=2, num_heads=2, d_attention=32, d_feedforward=32, d_router=16),
        *(2, 32, (1, 96), 4, 64, 8, 4),
    ),
}


@dataclass(frozen=True)
class Bench:
    """All that was measured: figures against targets, tokens per CPU second and bytes by contestant."""

    figures: tuple[Figure, ...]
    train_tokens_per_s: Mapping[str, float]
    decode_tokens_per_s: Mapping[str, float]
    peak_train_bytes: Mapping[str, int]


def run(request: BenchRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Measure this machine. Raises MachineError where a kernel computes wrong numbers: nothing is timed then."""
    if invocation.device == "gpu":
        raise InputError("bench times the CPU", "--device gpu", "leave --device out")
    wrong = [check.detail for check in self_check() if not check.passed]
    if wrong:
        raise MachineError("nothing was timed, because results are wrong", "; ".join(wrong), "see `mfext doctor`")
    console, threads, before = Console.of(invocation), invocation.threads or 1, torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(request.seed)
    try:
        done = _measure(SHAPES[request.size], threads, console)
    finally:
        torch.set_num_threads(before)
    return _report(done, request, threads)


def _measure(shape: Shape, threads: int, console: Console) -> Bench:
    rivals = dict(
        zip(NAMES, (shape.config, *(dense_rival(shape.config, size) for size in ("active", "total"))), strict=True)
    )
    figures = []
    for figure in (*_trained(shape, rivals), *_ops(shape), _grown(shape)):
        figures.append(figure)
        console.say(_line(figure))
    ours_ms = [figure.ours for figure in figures[:2]]
    train_ms = dict(zip(NAMES, (sum(ours_ms) / 2, figures[0].other, figures[1].other), strict=True))
    decode_ms = _decoded(shape, rivals)
    per_step, per_turn = 1e3 * shape.batch * shape.length, 1e3 * shape.decoded
    return Bench(
        tuple(figures),
        {name: per_step / ms for name, ms in train_ms.items()},
        {name: per_turn / ms for name, ms in decode_ms.items()},
        _peaks(shape, rivals, threads),
    )


def _trained(shape: Shape, rivals: Mapping[str, ModelConfig]) -> Iterator[Figure]:
    """Train steps against a dense transformer of equal active size, then against one of equal total size."""
    ids_BT, targets_BT = (torch.randint(0, shape.config.vocab_size, (shape.batch, shape.length)) for _ in range(2))
    steps = {name: train_step(new_model(config), ids_BT, targets_BT) for name, config in rivals.items()}
    what = f"train step {shape.batch} x {shape.length} / dense of equal"
    yield _at_most(f"{what} active size", steps["ours"], steps["dense_active"], 3, ACTIVE_AT_MOST)
    yield _at_least(f"{what} total size", steps["ours"], steps["dense_total"], 2, TOTAL_AT_LEAST)


def _ops(shape: Shape) -> Iterator[Figure]:
    """Forward and backward of the two ops a model spends its time in."""
    runs, what = attention(*shape.attended, False), "attention {} x {}".format(*shape.attended)
    yield _at_most(f"{what} / softmax", runs.ours, runs.dense, 5, SOFTMAX_AT_MOST)
    yield _at_least(f"{what} / plain formulation", runs.ours, runs.plain, 2, PLAIN_AT_LEAST)
    runs, what = expert_layer(shape.experts, shape.rows), f"{shape.experts} experts, K 2, {shape.rows} tokens"
    yield _at_most(f"{what} / dense of equal FLOPs", runs.ours, runs.dense, 5, EXPERTS_AT_MOST)
    yield _at_least(f"{what} / plain formulation", runs.ours, runs.plain, 3, PLAIN_AT_LEAST)


def _grown(shape: Shape) -> Figure:
    ids_BT, targets_BT = (torch.randint(0, shape.config.vocab_size, (shape.batch, shape.length)) for _ in range(2))
    new_only, everything = growth_steps(shape.config, NEW_IN_THE_SOFTMAX, ids_BT, targets_BT)
    what = "growth step, only new experts and routers train / full step"
    return _at_most(what, new_only, everything, 2, GROWTH_AT_MOST)


def _decoded(shape: Shape, rivals: Mapping[str, ModelConfig]) -> dict[str, float]:
    """Median milliseconds of `decoded` tokens of one sequence after a prompt, by contestant."""
    prompt_BT = torch.randint(0, shape.config.vocab_size, (1, shape.prompt))
    runs = {name: decode(new_model(config), prompt_BT, shape.decoded) for name, config in rivals.items()}
    ours_ms, active_ms = interleaved_ms(runs["ours"], runs["dense_active"], 5, 5)
    _, total_ms = interleaved_ms(runs["ours"], runs["dense_total"], 5, 5)
    return dict(zip(NAMES, (ours_ms, active_ms, total_ms), strict=True))


def _peaks(shape: Shape, rivals: Mapping[str, ModelConfig], threads: int) -> dict[str, int]:
    """A peak is a process's own and never falls, so every contestant has a fresh one."""
    sizes = [[each] * len(rivals) for each in (shape.batch, shape.length, threads)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return dict(zip(rivals, pool.map(peak_train_bytes, rivals.values(), *sizes), strict=True))


def _at_most(what: str, ours: Run, other: Run, times: int, target: float) -> Figure:
    ours_ms, other_ms = interleaved_ms(ours, other, times, times)
    return Figure(0, what, ours_ms, other_ms, "ms", ours_ms / other_ms, "at most", target)


def _at_least(what: str, ours: Run, other: Run, times: int, target: float) -> Figure:
    ours_ms, other_ms = interleaved_ms(ours, other, times, times)
    return Figure(0, what, ours_ms, other_ms, "ms", other_ms / ours_ms, "at least", target)


def _line(figure: Figure) -> str:
    return f"{figure.what}: {figure.ratio:.2f}x, {figure.rule} {figure.target:g}x: {_verdict(figure)}"


def _verdict(figure: Figure) -> str:
    return "hit" if figure.hit else "missed"


def _report(done: Bench, request: BenchRequest, threads: int) -> Report:
    targets = [
        {
            "name": each.what,
            "value": each.ratio,
            "target": each.target,
            "rule": each.rule,
            "hit": each.hit,
            "ours": each.ours,
            "other": each.other,
            "unit": each.unit,
        }
        for each in done.figures
    ]
    data: dict[str, object] = {
        "size": request.size,
        "targets": targets,
        "train_tokens_per_s": dict(done.train_tokens_per_s),
        "decode_tokens_per_s": dict(done.decode_tokens_per_s),
        "peak_train_bytes": dict(done.peak_train_bytes),
        "machine": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "blas": blas(),
        "cpu_products": products.explain(),
        "threads": threads,
        "torch": torch.__version__,
        "commit": commit_of(Path(__file__).resolve().parents[2]),
        "timer": TIMER,
    }
    missed = [each.what for each in done.figures if not each.hit]
    said = f"{len(done.figures) - len(missed)} of {len(done.figures)} targets hit"
    verdict = (said, *(f"missed: {what}" for what in missed))
    return Report("bench", data, "mfext bench", verdict, _sections(done, data))


def _sections(done: Bench, data: Mapping[str, object]) -> tuple[Section, ...]:
    columns = ("what", "ours", "other", "ratio", "target", "verdict")
    rows = tuple(
        (
            each.what,
            f"{each.ours:.1f} {each.unit}",
            f"{each.other:.1f} {each.unit}",
            f"{each.ratio:.2f}x",
            f"{each.rule} {each.target:g}x",
            _verdict(each),
        )
        for each in done.figures
    )
    speeds = tuple(
        (
            name.replace("_", ", "),
            f"{done.train_tokens_per_s[name]:,.0f}",
            f"{done.decode_tokens_per_s[name]:,.0f}",
            f"{done.peak_train_bytes[name] / 1e6:,.0f} MB",
        )
        for name in NAMES
    )
    about = ("machine", "cpu_capability", "blas", "cpu_products", "threads", "torch", "commit", "timer")
    return (
        Table("Against its targets", columns=columns, rows=rows, text_columns=("what", "target", "verdict")),
        Table(
            "Tokens per CPU second, and memory",
            columns=("model", "training", "decoding", "peak of a train step"),
            rows=speeds,
            text_columns=("model",),
            note="dense, active: as many active parameters a token; dense, total: as many parameters in all",
        ),
        KeyValues("Measured on", pairs=tuple((key, str(data[key])) for key in about if data[key] is not None)),
    )
