"""Find the block sizes of the Triton kernels on this card: `python kernels/bench/tune.py` (bf16; a few minutes).

Times every candidate of every op, the others as the table has them, and prints the best beside what the table says. The
table in mfext_kernels/tuning.py is written by hand: a kernel's results must not depend on a race at run time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gpu  # first: it puts the kernels on the path
import torch

from mfext_kernels import tuning
from mfext_kernels.grouped_linear import expert_feedforward
from mfext_kernels.routing import make_dispatch
from mfext_kernels.stickbreaking import stickbreaking_attention
from mfext_kernels.tuning import Config, Op

Make = Callable[[], gpu.Run]
FORWARD = (
    (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 2), (128, 32, 8, 2),
    (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 8, 2),
)  # fmt: skip
BACKWARD = (
    (32, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (64, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1),
    (32, 64, 4, 2), (128, 32, 8, 2), (128, 64, 8, 1), (128, 32, 4, 2),
)  # fmt: skip
PRODUCTS = (
    (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 128, 32, 4, 4), (128, 128, 32, 8, 4),
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 256, 64, 8, 3),
    (128, 256, 32, 8, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One candidate of an op, for rows of `width` numbers."""

    op: Op
    width: int
    config: Config


def attention(width: int, backward: bool) -> gpu.Run:
    """4 x 4096, 8 heads, K 2, half of it with sticks that last."""
    runs = []
    for lasting in (False, True):
        q = gpu.random_bf16(4, 4096, 2, 512 // width, width)
        k, v = (gpu.random_bf16(4, 4096, 512 // width, width) for _ in range(2))
        if lasting:
            q *= 0.5
            q[..., 0], k[..., 0] = 1.0, -6 * width**0.5
        make = gpu.trained if backward else gpu.untrained
        runs.append(make(stickbreaking_attention, (q, k, v)))
    return lambda: [run() for run in runs]


def experts(backward: bool) -> gpu.Run:
    """16384 tokens, D and F 1024, E 32, K 2."""
    x, gates = gpu.random_bf16(16384, 1024), torch.rand(16384, 2, device="cuda", dtype=torch.bfloat16)
    up, down = gpu.random_bf16(32, 1024, 1024), gpu.random_bf16(32, 1024, 1024)
    dispatch = make_dispatch(torch.rand(16384, 32, device="cuda").topk(2, dim=-1).indices, 32)
    make = gpu.trained if backward else gpu.untrained
    return make(lambda x, g, u, d: expert_feedforward(x, [u], [d], g, dispatch), (x, gates, up, down))


def problems() -> Iterator[tuple[Op, int, Make, tuple[Config, ...]]]:
    for width in (64, 128):
        forward, backward = (tuple(Config(r, k, 0, w, s) for r, k, w, s in each) for each in (FORWARD, BACKWARD))
        yield "attention_forward", width, partial(attention, width, False), forward
        yield "attention_backward", width, partial(attention, width, True), backward
    products = tuple(Config(*each) for each in PRODUCTS)
    ops: tuple[tuple[Op, bool], ...] = (("rows", False), ("weights", True))
    for op, backward in ops:
        yield op, 1024, partial(experts, backward), products


def compiled(trial: Trial) -> str | None:
    """Run it once, which leaves it in Triton's cache -> why it does not run, or None."""
    try:
        use(trial)()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not fit the card is no candidate
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}"
    return None


def use(trial: Trial) -> gpu.Run:
    """The problem of the trial's op, and the table with the trial's sizes in it from now on."""
    kind = "sm_{}{}".format(*torch.cuda.get_device_capability())
    table = ORIGINAL.get(kind, ORIGINAL["default"])
    tuning.TABLE = {**ORIGINAL, kind: {**table, trial.op: (trial.config,) * 3}}
    (make,) = [make for op, width, make, _ in problems() if (op, width) == (trial.op, trial.width)]
    return make()


ORIGINAL = tuning.TABLE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON with every candidate's time goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels/bench/tune.py: needs a CUDA GPU and finds none; nothing was timed", file=sys.stderr)
        return 2
    trials = [Trial(op, width, config) for op, width, _, configs in problems() for config in configs]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), multiprocessing.get_context("spawn")) as pool:
        refused = dict(zip(trials, pool.map(compiled, trials), strict=True))
    rows: list[dict[str, object]] = []
    for op, width, make, configs in problems():
        tuning.TABLE = ORIGINAL
        times = {}
        before = gpu.median_ms(make(), 9)
        for trial in (Trial(op, width, config) for config in configs):
            if refused[trial] is None:
                times[trial.config] = gpu.median_ms(use(trial), 9)
            rows.append({"op": op, "width": width, **asdict(trial.config), "ms": times.get(trial.config)})
            rows[-1] |= {} if refused[trial] is None else {"why": refused[trial]}
        ranked = sorted(times, key=lambda config: times[config])
        best = "  ".join(f"{times[c]:.3f} {c.rows, c.columns, c.depth, c.warps, c.stages}" for c in ranked[:4])
        print(f"{op} {width}: table {before:.3f} ms; {best}; {len(configs) - len(times)} do not run", flush=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
