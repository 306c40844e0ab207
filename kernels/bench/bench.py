"""Measure mfext against its speed targets: `python kernels/bench/bench.py` (about six minutes on one thread).

Prints one line per target, hit or MISSED, writes them as JSON, and ends with 1 if one was missed, 2 if a kernel
or the model is wrong (nothing is timed then). Config S, random data, one thread, process CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import contestants  # noqa: E402
import torch  # noqa: E402
from measure import ROOT, child_peak_mb, surroundings  # noqa: E402
from torch import Tensor  # noqa: E402

from mfext.commands import rivals  # noqa: E402
from mfext.commands.footprint import PROMPT, SIDE_BY_SIDE  # noqa: E402
from mfext.metrics.speed import Figure, Run, interleaved_ms, peak_kb  # noqa: E402
from mfext.model.build import new_model  # noqa: E402
from mfext.model.language_model import LanguageModel  # noqa: E402
from mfext.process import keep_freed_memory  # noqa: E402
from mfext_kernels import self_check  # noqa: E402

SHAPES = {256: 8, 512: 8, 1024: 2, 2048: 1}  # length: batch
TRAIN_AT_LEAST = {256: 1.5, 512: 5.0, 1024: 9.0, 2048: 17.0}
EVALUATE_AT_LEAST = {256: 3.3, 512: 8.0, 1024: 15.0, 2048: 27.0}
DECODE_AT_LEAST = {128: 5.0, 512: 6.0, 2016: 25.0}
EXPERTS_AT_MOST = {32: 1.25, 64: 1.35}
MEMORY_AT_LEAST = {512: 3.5, 2048: 8.0}
ATTENTION_AT_MOST = 1.3
DENSE_LENGTHS = (256, 512)
ACTIVE_AT_MOST, TOTAL_AT_LEAST = 1.3, 2.5
GROWTH_AT_MOST = 0.75
EXPERTS_16_FOLD_AT_MOST = 1.15
CLOSED_GENERATIONS, EACH_AT_MOST = 4, 0.05


def line(row: Figure) -> str:
    note = "" if row.counts else "  (reported, not a target)"
    return (
        f"{row.number}  {row.what:<52} {row.ours:>9.1f} {row.other:>9.1f} {row.unit:<8}"
        f"{row.ratio:>7.2f}x  {row.rule} {row.target:<5g} {row.share:>5.0%}  {verdict(row)}{note}"
    )


def verdict(row: Figure) -> str:
    return "hit" if row.hit else "MISSED"


def whole_model() -> Iterator[Figure]:
    """Targets 1 and 2: train step and evaluation forward against the published formulation."""
    mine, theirs = contestants.ours(), contestants.published()
    for length, batch in SHAPES.items():
        ids, targets = (torch.randint(0, 512, (batch, length)) for _ in range(2))
        times = (5, 3) if length <= 256 else (5, 1)
        fast, slow = interleaved_ms(partial(mine.evaluate, ids), partial(theirs.evaluate, ids), *times)
        target = EVALUATE_AT_LEAST[length]
        yield Figure(
            2, f"eval forward {batch} x {length} / published", fast, slow, "ms", slow / fast, "at least", target
        )
        steps = mine.train_step(ids, targets), theirs.train_step(ids, targets)
        fast, slow = interleaved_ms(*steps, *times)
        target = TRAIN_AT_LEAST[length]
        yield Figure(1, f"train step {batch} x {length} / published", fast, slow, "ms", slow / fast, "at least", target)


def attention() -> Iterator[Figure]:
    """Target 3: forward and backward against softmax SDPA; and where sticks last, which random data never shows."""
    for lasting in (False, True):
        for length in (512, 1024, 2048):
            batch = SHAPES[length]
            runs = rivals.attention(batch, length, lasting)
            fast, soft = interleaved_ms(runs.ours, runs.dense, 7, 7)
            name = f"attention {batch} x {length} / softmax SDPA" + (", lasting sticks" if lasting else "")
            yield Figure(3, name, fast, soft, "ms", fast / soft, "at most", ATTENTION_AT_MOST, counts=not lasting)


def experts() -> Iterator[Figure]:
    """Target 4: the expert layer against a dense layer of equal active FLOPs."""
    for num_experts, target in EXPERTS_AT_MOST.items():
        runs = rivals.expert_layer(num_experts)
        fast, dense = interleaved_ms(runs.ours, runs.dense, 11, 11)
        yield Figure(
            4, f"experts E {num_experts}, K 2, 4096 tokens / dense", fast, dense, "ms", fast / dense, "at most", target
        )


def dense_models() -> Iterator[Figure]:
    """Target 5: train steps against dense transformers of equal active FLOPs (A) and of equal total parameters (P)."""
    ours = new_model(rivals.CONFIG_S)
    dense = {size: new_model(rivals.dense_rival(rivals.CONFIG_S, size)) for size in ("active", "total")}
    for length in DENSE_LENGTHS:
        batch = SHAPES[length]
        ids, targets = (torch.randint(0, 512, (batch, length)) for _ in range(2))
        steps = {size: rivals.train_step(model, ids, targets) for size, model in dense.items()}
        mine, what = rivals.train_step(ours, ids, targets), f"train step {batch} x {length} / Dense-"
        fast, slow = interleaved_ms(mine, steps["active"], 3, 3)
        yield Figure(5, what + "A", fast, slow, "ms", fast / slow, "at most", ACTIVE_AT_MOST)
        fast, slow = interleaved_ms(mine, steps["total"], 3, 2)
        yield Figure(5, what + "P", fast, slow, "ms", slow / fast, "at least", TOTAL_AT_LEAST)


def growth() -> Iterator[Figure]:
    """Target 8: a growth step in which only new experts and routers train against a full step of the same model.

    The target is of the published form (compete), in which it was set: a token chooses as many experts among old and
    new ones. Gated, and the gate held open on every token, new experts come on top of those it chose before; that step
    is reported beside it, since counted in floating-point operations it is 0.82 of a full one.
    """
    ids, targets = (torch.randint(0, 512, (SHAPES[256], 256)) for _ in range(2))
    for growth in (rivals.NEW_IN_THE_SOFTMAX, rivals.NEW_EXPERTS):
        for layers in ("all", "top_half"):
            steps = rivals.growth_steps(rivals.CONFIG_S, replace(growth, layers=layers), ids, targets)
            for step in steps * 2:
                step()  # until neither needs memory that the process has not had
            fast, full = interleaved_ms(*steps, 7, 7)
            what = f"growth step {SHAPES[256]} x 256, {growth.mode}, layers {layers} / full step"
            counts = growth.mode == "compete" and layers == "all"
            yield Figure(8, what, fast, full, "ms", fast / full, "at most", GROWTH_AT_MOST, counts)


def memory() -> Iterator[Figure]:
    """Target 6: peak memory of one train step over process start, each in a process of its own."""
    for length, target in MEMORY_AT_LEAST.items():
        fast, slow = (child_peak_mb(["--peak-of", which, "--length", str(length)]) for which in ("ours", "published"))
        name = f"peak training memory {SHAPES[length]} x {length} / published"
        yield Figure(6, name, fast, slow, "MB", slow / fast, "at least", target)


def decoding() -> Iterator[Figure]:
    """Target 7: tokens per second after a prompt, one sequence; and without a target, `decoding_side_by_side`."""
    mine, theirs = contestants.ours(), contestants.published()
    count = 16
    for prompt, target in DECODE_AT_LEAST.items():
        ids = torch.randint(0, 512, (1, prompt))
        fast, slow = interleaved_ms(mine.prefill(ids, count), theirs.prefill(ids, count), 7, 3)
        per_second = [count * 1e3 / each for each in (fast, slow)]
        yield Figure(7, f"decode after {prompt} / published", *per_second, "tokens/s", slow / fast, "at least", target)
    yield from decoding_side_by_side(count)


def decoding_side_by_side(count: int) -> Iterator[Figure]:
    """Several sequences against one, and with half of the experts: those that chose the same expert read it once; and
    one and several with a generation open on every token against the same model without it."""
    config, prompts = rivals.CONFIG_S, torch.randint(0, 512, (SIDE_BY_SIDE, PROMPT))
    half = replace(
        config, **{each: getattr(config, each) // 2 for each in ("attention_experts", "feedforward_experts")}
    )
    fewer, alone, all_of_them = (
        rivals.decode(new_model(each), rows, count)
        for each, rows in ((half, prompts), (config, prompts[:1]), (config, prompts))
    )
    open_model = rivals.grown_and_open(config)
    open_alone, open_together = (rivals.decode(open_model, rows, count) for rows in (prompts[:1], prompts))
    for what, ours, other, rows, at_least in (
        (f"{SIDE_BY_SIDE} sequences / one", all_of_them, alone, (SIDE_BY_SIDE, 1), 1.0),
        (f"{SIDE_BY_SIDE} sequences, half of the experts / all", fewer, all_of_them, (SIDE_BY_SIDE,) * 2, 1.0),
        ("one sequence, a generation open / none", open_alone, alone, (1, 1), 0.5),
        (f"{SIDE_BY_SIDE} sequences, a generation open / none", open_together, all_of_them, (SIDE_BY_SIDE,) * 2, 0.5),
    ):
        times_ms = interleaved_ms(ours, other, 7, 7)
        here, there = (count * 1e3 * each / ms for each, ms in zip(rows, times_ms, strict=True))
        name = f"decode after {PROMPT}, {what}"
        yield Figure(7, name, here, there, "tokens/s", here / there, "at least", at_least, counts=False)


def scaling() -> Iterator[Figure]:
    """How an evaluation forward grows with experts, layers, length and generations whose gates are closed."""

    def rows(what: str, longer: Run, shorter: Run, at_most: float) -> Figure:
        more, less = interleaved_ms(longer, shorter, 9, 9)
        return Figure(10, f"forward, {what}", more, less, "ms", more / less, "at most", at_most, counts=False)

    ids = torch.randint(0, 512, (SHAPES[512], 512))
    many, few = (_forward(new_model(rivals.with_experts(rivals.CONFIG_S, each)), ids) for each in (128, 8))
    yield rows("128 experts a site / 8, K 2, 8 x 512", many, few, EXPERTS_16_FOLD_AT_MOST)
    deep, flat = (_forward(new_model(replace(rivals.CONFIG_S, num_layers=each)), ids) for each in (8, 2))
    yield rows("8 layers / 2, 8 x 512", deep, flat, 4.0)
    model = new_model(rivals.CONFIG_S)
    long, short = (torch.randint(0, 512, (2, each)) for each in (2048, 256))
    yield rows("2 x 2048 / 2 x 256", _forward(model, long), _forward(model, short), 64.0)
    closed = rivals.grown_and_closed(rivals.CONFIG_S, CLOSED_GENERATIONS)
    allowed = 1 + CLOSED_GENERATIONS * EACH_AT_MOST
    what = f"{CLOSED_GENERATIONS} closed generations / none, 8 x 512"
    yield rows(what, _forward(closed, ids), _forward(model, ids), allowed)


def _forward(model: LanguageModel, ids_BT: Tensor) -> Run:
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(ids_BT)

    return run


PARTS = {
    "model": whole_model,
    "attention": attention,
    "experts": experts,
    "dense": dense_models,
    "memory": memory,
    "decode": decoding,
    "growth": growth,
    "scaling": scaling,
}


def faults() -> list[str]:
    """What must be right before anything is timed: every kernel, and the model against the published formulation."""
    wrong = [result.detail for result in self_check() if not result.passed]
    ids = torch.randint(0, 512, (2, 130))
    mine, theirs = (make().evaluate(ids) for make in (contestants.ours, contestants.published))
    error = float((mine - theirs).abs().max() / theirs.abs().max())
    if not error < 1e-4:
        wrong.append(f"config S: logits differ from the published formulation's by {error:.1e} of the largest")
    return wrong


def report_peak(which: str, length: int) -> None:
    start = peak_kb()
    contestant = contestants.ours() if which == "ours" else contestants.published()
    ids, targets = (torch.randint(0, 512, (SHAPES[length], length)) for _ in range(2))
    contestant.train_step(ids, targets)()
    print(json.dumps({"peak_mb": (peak_kb() - start) * 1024 / 1e6}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results" / "bench.json", help="where the JSON goes"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="measure these parts alone")
    parser.add_argument("--peak-of", choices=["ours", "published"], help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=512, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()  # as every verb does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.peak_of:
        report_peak(arguments.peak_of, arguments.length)
        return 0
    wrong = faults()
    if wrong:
        print("nothing was timed, because results are wrong:\n  " + "\n  ".join(wrong), file=sys.stderr)
        return 2
    about = surroundings()
    print("  ".join(f"{name}: {value}" for name, value in about.items()))
    print(f"   {'what':<52} {'ours':>9} {'other':>9}")
    rows = []
    for name in arguments.only:
        for row in PARTS[name]():
            rows.append(row)
            print(line(row), flush=True)
    missed = [row.what for row in rows if row.counts and not row.hit]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = [asdict(row) | {"share": row.share, "verdict": verdict(row)} for row in rows]
    arguments.out.write_text(json.dumps({"surroundings": about, "missed": missed, "rows": results}, indent=1) + "\n")
    print(f"{len(missed)} MISSED: {'; '.join(missed)}" if missed else "every target hit")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
