"""Whole models on one GPU: `python kernels/bench/gpu_models.py` (bf16, random weights and data; a few minutes).

Two layouts, the published MoLM of 350 M active and 4 B parameters in all and one of 100 M active, each beside a dense
softmax transformer of equal active and one of equal total parameters: training tokens/s (forward, balance loss,
backward, fused AdamW with bf16 moments), peak memory, the share of the card's own measured matmul ceiling, evaluation;
both once launched kernel by kernel and once recorded as a CUDA graph, where launching costs nothing; and greedy
decoding after a prompt (ModuleFormer's step is replayed as a CUDA graph; the dense rivals' is not, so it stands beside
ModuleFormer's launch by launch); and a growth step of the smaller layout against a full one. Run gpu.py first: it
checks the kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gpu  # first: it puts the kernels on the path

sys.path.insert(0, str(gpu.ROOT))

import torch

from mfext.commands import rivals
from mfext.config import ModelConfig
from mfext.growth.plan import count_parameters
from mfext.model import graphed_step
from mfext.model.build import new_model
from mfext.model.language_model import LanguageModel

LENGTH, PROMPT, NEW = 2048, 512, 32
HEAD = 128  # width of the dense rivals' heads, and what their feed-forward width is a multiple of
MOLM_4B = ModelConfig(
    vocab_size=50295,
    d_model=1024,
    num_layers=24,
    num_heads=1,
    d_attention=1024,
    attention_experts=16,
    feedforward_experts=32,
    d_feedforward=2048,
    d_router=256,
)
MOLM_100M = ModelConfig(
    vocab_size=32000,
    d_model=768,
    num_layers=12,
    num_heads=12,
    d_attention=768,
    attention_experts=8,
    feedforward_experts=32,
    d_feedforward=1536,
    d_router=128,
)


@dataclass(frozen=True)
class Layout:
    """A model, the rows of its training batch, and into how many micro-batches its dense rival of equal size cuts them
    (whose feed-forward activations are many times as wide)."""

    name: str
    config: ModelConfig
    batch: int
    total_micro_batches: int


LAYOUTS = (Layout("100M", MOLM_100M, 16, 2), Layout("350M of 4B", MOLM_4B, 16, 8))


def models(layout: Layout) -> Iterator[tuple[str, ModelConfig, int]]:
    """(name, config, micro-batches) of the ModuleFormer and its two dense rivals."""
    yield "ModuleFormer", layout.config, 1
    active, total = (rivals.dense_rival(layout.config, size) for size in ("active", "total"))
    yield "dense of equal active parameters", _round(active), 1
    yield "dense of equal total parameters", _round(total), layout.total_micro_batches


def _round(dense: ModelConfig) -> ModelConfig:
    """With heads of the usual width, and a feed-forward width that cuBLAS multiplies at full speed."""
    inner = round(dense.d_feedforward / HEAD) * HEAD
    return replace(dense, num_heads=dense.d_attention // HEAD, d_feedforward=inner)


def built(config: ModelConfig) -> LanguageModel:
    """Fresh bf16 weights on the card."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return new_model(config)
    finally:
        torch.set_default_dtype(torch.float32)


def flops_per_token(config: ModelConfig) -> float:
    """Of one forward: two per active parameter but the embedding's row, and attention's two causal products."""
    attended = config.attention_experts_per_token * config.d_attention
    weights = count_parameters(config).active_per_token - config.d_model
    return 2 * weights + 2 * LENGTH * attended * config.num_layers


def measure(config: ModelConfig, batch: int, micro_batches: int, ceiling: float) -> dict[str, object]:
    counts = count_parameters(config)
    row: dict[str, object] = {"parameters": counts.total, "active_parameters": counts.active_per_token}
    model = built(config)
    ids = torch.randint(0, config.vocab_size, (batch, LENGTH), device="cuda")
    with torch.no_grad():
        ms = gpu.median_ms(lambda: model(ids[: batch // micro_batches]), 5)
    row["evaluate_tokens_per_s"] = batch // micro_batches * LENGTH / ms * 1e3
    for rows in (1, 32):
        prompt = ids[:1, :PROMPT].expand(rows, PROMPT)
        row[f"decode_ms_per_token_batch_{rows}"] = gpu.median_ms(rivals.decode(model, prompt, NEW), 3) / NEW
    if config.architecture == "moduleformer":
        with unrecorded():
            row["decode_launch_by_launch_ms_per_token_batch_1"] = (
                gpu.median_ms(rivals.decode(model, ids[:1, :PROMPT], NEW), 3) / NEW
            )
    torch.cuda.reset_peak_memory_stats()
    step, tflop = rivals.train_step(model, ids, ids.roll(-1, 1), micro_batches), 3 * flops_per_token(config) / 1e12
    ms = gpu.median_ms(step, 7)
    row["train_peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    row["train_ms"], row["train_tokens_per_s"] = ms, batch * LENGTH / ms * 1e3
    row["train_TFLOP_per_s"] = tflop * batch * LENGTH / ms * 1e3
    row["share_of_matmul_ceiling"] = tflop * batch * LENGTH / ms * 1e3 / ceiling
    ms = gpu.recorded_ms(step, 7)
    row["train_recorded_ms"], row["train_recorded_tokens_per_s"] = ms, batch * LENGTH / ms * 1e3
    row["recorded_share_of_matmul_ceiling"] = tflop * batch * LENGTH / ms * 1e3 / ceiling
    with torch.no_grad():
        ms = gpu.recorded_ms(lambda: model(ids[: batch // micro_batches]), 5)
    row["evaluate_recorded_tokens_per_s"] = batch // micro_batches * LENGTH / ms * 1e3
    return row


@contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, no decoding step is replayed as a graph."""
    before = graphed_step.STEPS_BEFORE_RECORDING
    graphed_step.STEPS_BEFORE_RECORDING = sys.maxsize
    try:
        yield
    finally:
        graphed_step.STEPS_BEFORE_RECORDING = before


def growth(layout: Layout) -> dict[str, object]:
    """Milliseconds and peak memory of a step that trains new experts and routers alone, and of a full one."""
    ids = torch.randint(0, layout.config.vocab_size, (layout.batch, LENGTH), device="cuda")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            steps = rivals.growth_steps(layout.config, rivals.NEW_EXPERTS, ids, ids.roll(-1, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    row: dict[str, object] = {}
    for suffix, timed in (("", gpu.median_ms), ("recorded_", gpu.recorded_ms)):
        new_ms, full_ms = (timed(step, 7) for step in steps)
        row |= {f"new_experts_{suffix}ms": new_ms, f"full_{suffix}ms": full_ms, f"{suffix}ratio": new_ms / full_ms}
    return row


def attempted(measured: Callable[[], dict[str, object]]) -> dict[str, object]:
    """What was measured, or why it could not be."""
    try:
        return measured()
    except torch.cuda.OutOfMemoryError as error:
        return {"reason": str(error).split(". ")[0]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = gpu.ROOT / "docs" / "results" / "gpu_models.json"
    parser.add_argument("--out", type=Path, default=out, help="where the JSON goes")
    names = [layout.name for layout in LAYOUTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="measure these layouts alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels/bench/gpu_models.py: needs a CUDA GPU and finds none; nothing was timed", file=sys.stderr)
        return 2
    about = gpu.surroundings() | {"ceilings": gpu.ceilings()}
    print("  ".join(f"{name}: {value}" for name, value in about.items()))
    ceiling = gpu.ceilings()["matmul_bf16_TFLOP_per_s"]
    results: dict[str, object] = {"surroundings": about, "length": LENGTH, "prompt": PROMPT}
    for layout in (each for each in LAYOUTS if each.name in arguments.only):
        rows: dict[str, object] = {"batch": layout.batch}
        results[layout.name] = rows
        for name, measured in measurements(layout, ceiling):
            rows[name] = row = attempted(measured)
            print(f"{layout.name}, {name}: {shown(row)}", flush=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measurements(layout: Layout, ceiling: float) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    for name, config, micro_batches in models(layout):
        yield name, partial(measure, config, layout.batch, micro_batches, ceiling)
    if layout.config is MOLM_100M:
        yield "growth step", partial(growth, layout)


def shown(row: dict[str, object]) -> str:
    return "  ".join(f"{key} {each:.4g}" if isinstance(each, float) else f"{key} {each}" for key, each in row.items())


if __name__ == "__main__":
    raise SystemExit(main())
