"""Check, then time, the Triton kernels on one GPU: `python kernels/bench/gpu.py` (bf16; a minute or two).

Every op is first compared with its float64 reference, forward and every gradient, on fresh random inputs with every new
buffer full of NaN; a wrong kernel ends the run with 2 and nothing timed. Then medians by events against softmax
attention by flash SDPA, torch's grouped_mm, dense layers of equal FLOPs and torch's head with cross-entropy, beside the
card's own ceilings; and both again as recorded CUDA graphs, where launching costs nothing. Prints a table, writes it as
JSON, and ends with 1 if a target is missed (as launched). Without a GPU: one line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels")]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from mfext_kernels.backends import Backend  # noqa: E402
from mfext_kernels.cross_entropy import cross_entropy  # noqa: E402
from mfext_kernels.fused_linear_cross_entropy import fused_linear_cross_entropy  # noqa: E402
from mfext_kernels.grouped_linear import expert_feedforward, gather_linear, scatter_linear  # noqa: E402
from mfext_kernels.routing import make_dispatch  # noqa: E402
from mfext_kernels.stickbreaking import stickbreaking_attention, stickbreaking_decode  # noqa: E402

Op = Callable[..., Tensor]
Run = Callable[[], object]
ROUNDINGS = 4  # from the inputs to the output in 16 bits, at most
ATTENTION_AT_MOST, EXPERTS_AT_MOST = 1.5, 1.15


@dataclass(frozen=True)
class Row:
    """One op's milliseconds beside another's, launched and recorded; `at_most` is the target for the launched ratio."""

    what: str
    ours_ms: float
    other_ms: float
    ours_recorded_ms: float
    other_recorded_ms: float
    at_most: float | None = None

    @classmethod
    def of(cls, what: str, ours: Run, other: Run, at_most: float | None = None) -> Row:
        launched = median_ms(ours), median_ms(other)
        return cls(what, *launched, recorded_ms(ours), recorded_ms(other), at_most)

    @property
    def missed(self) -> bool:
        return self.at_most is not None and not self.ours_ms / self.other_ms <= self.at_most

    def line(self) -> str:
        target = "" if self.at_most is None else f"  at most {self.at_most:g}  {'MISSED' if self.missed else 'hit'}"
        pairs = (self.ours_ms, self.other_ms), (self.ours_recorded_ms, self.other_recorded_ms)
        numbers = "".join(f"{ours:>9.3f}{other:>9.3f}{ours / other:>7.2f}x" for ours, other in pairs)
        return f"{self.what:<66}{numbers}{target}"


def faults(dtypes: Sequence[torch.dtype]) -> list[str]:
    """Every op that is further from its float64 reference than its dtype's rounding explains, and by how much.

    Compiling takes longer than running, so the checks are shared out among processes, one for two cores.
    """
    count = sum(1 for _ in checks(torch.device("cpu")))
    jobs = [(dtype, number) for number in range(count) for dtype in dtypes]
    workers = max(1, (os.cpu_count() or 2) // 2)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [fault for found in pool.map(check, *zip(*jobs, strict=True)) for fault in found]


def check(dtype: torch.dtype, number: int, device: str = "cuda") -> list[str]:
    """The faults of one of `checks` in one dtype, on fresh inputs, every new buffer full of NaN."""
    name, make_op, inputs = next(islice(checks(torch.device(device)), number, None))
    inputs = [each.to(dtype) for each in inputs]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        fast = forward_and_gradients(make_op("triton"), inputs)
        exact = forward_and_gradients(make_op("reference"), [each.double() for each in inputs])
    except Exception as error:  # a kernel that does not compile on this card is a fault of that kernel alone
        return [f"{name}, {dtype}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}"]
    finally:
        torch.use_deterministic_algorithms(False)
    wrong = []
    allowed = ROUNDINGS * torch.finfo(dtype).eps if dtype != torch.float32 else 64 * torch.finfo(dtype).eps
    for part, (one, other) in enumerate(zip(fast, exact, strict=True)):
        error = float((one.double() - other).abs().max() / other.abs().max())
        if not error <= allowed:
            where = "output" if part == 0 else f"gradient of input {part - 1}"
            wrong.append(f"{name}, {dtype}, {where}: off by {error:.1e} of the largest, allowed {allowed:.1e}")
    return wrong


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[Backend], Op], list[Tensor]]]:
    """(name, op of a backend, fp32 inputs) of every op, at sizes that leave every last tile in part."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device) * scale

    starts = torch.tensor([[0] * 70 + [80] * 63, [5] * 133], device=device)
    for width in (20, 64, 128, 320):
        qkv = [random(2, 133, 2, 1, width), random(2, 150, 1, width), random(2, 150, 1, width)]
        for name, first in (("attention", None), ("attention in documents", starts)):
            yield f"{name}, C {width}", lambda b, s=first: lambda q, k, v: stickbreaking_attention(q, k, v, s, b), qkv
        one = [qkv[0][:, 0], *qkv[1:]]
        for name, ends in (("decoding", None), ("decoding in a cache's room", torch.tensor([3, 141], device=device))):
            yield f"{name}, C {width}", lambda b, e=ends: lambda q, k, v: decode(q, k, v, b, e), one
    scores = torch.rand(75, 6, device=device)
    scores[:, 2] = -1.0
    dispatch = make_dispatch(scores.topk(2, dim=-1).indices, 6)
    up, down = [[random(size, *shape, scale=0.2) for size in (4, 2)] for shape in ((72, 40), (40, 72))]
    x, gates = random(75, 72), torch.rand(75, 2, device=device)
    yield "gather_linear", lambda b: lambda x, *w: gather_linear(x, w, dispatch, b), [x, *up]
    rows = random(150, 40)
    yield "scatter_linear", lambda b: lambda x, g, *w: scatter_linear(x, w, g, dispatch, b), [rows, gates, *down]
    one_stack = [random(6, 72, 40, scale=0.2), random(6, 40, 72, scale=0.2)]
    yield "gather_linear, one stack", lambda b: lambda x, w: gather_linear(x, [w], dispatch, b), [x, one_stack[0]]
    alone = [x, gates, *one_stack]
    yield (
        "expert_feedforward, one stack",
        lambda b: lambda x, g, u, d: expert_feedforward(x, [u], [d], g, dispatch, b),
        alone,
    )
    feed = [x, gates, *up, *down]
    yield "expert_feedforward", lambda b: lambda x, g, *w: expert_feedforward(x, w[:2], w[2:], g, dispatch, b), feed
    targets = torch.randint(0, 333, (75,), device=device)
    targets[3:9] = -100
    yield "cross-entropy", lambda b: lambda logits: cross_entropy(logits, targets, b), [random(75, 333, scale=3.0)]
    head = [x, random(333, 72, scale=0.1)]
    yield "head and cross-entropy", lambda b: lambda x, w: fused_linear_cross_entropy(x, w, targets, b), head


def decode(q_BKHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, backend: Backend, ends_B: Tensor | None) -> Tensor:
    """Without gradients, where decoding has kernels of its own."""
    with torch.no_grad():
        return stickbreaking_decode(q_BKHC, k_BSHC, v_BSHC, None, backend, ends_B)


def forward_and_gradients(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a weighting of it where it has any."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = op(*leaves)
    if not out.requires_grad:
        return [out]
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weighting.to(out))]


def median_ms(run: Run, times: int = 25) -> float:
    """Median milliseconds by events, after three runs that compile and warm; the cache is not emptied between."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(times):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last))
    return statistics.median(taken)


def recorded_ms(run: Run, times: int = 25) -> float:
    """Median milliseconds of `run` replayed as a CUDA graph: what the card itself takes, launches left out."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay, times)


def trained(op: Op, inputs: Sequence[Tensor]) -> Run:
    """Forward and every gradient of `op(*inputs)`, for a random gradient of its output."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    grad = torch.randn_like(op(*leaves))
    return lambda: torch.autograd.grad(op(*leaves), leaves, grad)


def untrained(op: Op, inputs: Sequence[Tensor]) -> Run:
    @torch.no_grad()
    def run() -> None:
        op(*inputs)

    return run


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def attention() -> Iterator[Row]:
    """Against flash SDPA with as many heads, K * H; with random logits, and with sticks that last."""
    chosen, heads, width = 2, 8, 64

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for length in (2048, 4096, 8192):
        batch = 16384 // length
        soft = [random_bf16(batch, chosen * heads, length, width) for _ in range(3)]
        for lasting in (False, True):
            q = random_bf16(batch, length, chosen, heads, width)
            k, v = (random_bf16(batch, length, heads, width) for _ in range(2))
            if lasting:
                q *= 0.5
                q[..., 0], k[..., 0] = 1.0, -6 * width**0.5
            name = f"attention {batch} x {length}, {'lasting sticks' if lasting else 'random'}"
            runs = untrained(stickbreaking_attention, (q, k, v)), untrained(flash, soft)
            yield Row.of(f"{name}, forward / flash SDPA", *runs)
            runs = trained(stickbreaking_attention, (q, k, v)), trained(flash, soft)
            yield Row.of(f"{name}, forward + backward / flash SDPA", *runs, ATTENTION_AT_MOST)
        one = q[:, 0], k, v
        soft_one = [soft[0][:, :, :1], *soft[1:]]
        runs = untrained(stickbreaking_decode, one), untrained(F.scaled_dot_product_attention, soft_one)
        yield Row.of(f"decoding {batch} x 1 after {length} / SDPA", *runs)


def experts() -> Iterator[Row]:
    """Against a dense layer of equal active FLOPs, and the same experts through torch's grouped_mm; sorts included."""
    tokens, width, inner, chosen = 16384, 1024, 1024, 2
    x, gates = random_bf16(tokens, width), torch.rand(tokens, chosen, device="cuda", dtype=torch.bfloat16)
    dense = [x, random_bf16(width, chosen * inner), random_bf16(chosen * inner, width)]
    run_dense = trained(lambda x, up, down: F.gelu(x @ up, approximate="tanh") @ down, dense)
    for num_experts in (8, 32, 64):
        experts_NK = torch.rand(tokens, num_experts, device="cuda").topk(chosen, dim=-1).indices
        up, down = random_bf16(num_experts, width, inner), random_bf16(num_experts, inner, width)

        def ours(x: Tensor, gates: Tensor, up: Tensor, down: Tensor, chosen: Tensor = experts_NK) -> Tensor:
            return expert_feedforward(x, [up], [down], gates, make_dispatch(chosen, up.shape[0]))

        def grouped(x: Tensor, gates: Tensor, up: Tensor, down: Tensor, chosen: Tensor = experts_NK) -> Tensor:
            dispatch = make_dispatch(chosen, up.shape[0])
            ends = dispatch.bounds_E1[1:]
            hidden = F.gelu(F.grouped_mm(x[dispatch.tokens_R], up, offs=ends), approximate="tanh")
            rows = F.grouped_mm(hidden, down, offs=ends)[dispatch.inverse_R]
            return (rows.view(*gates.shape, -1) * gates.unsqueeze(-1)).sum(1)

        run_ours, run_grouped = (trained(op, (x, gates, up, down)) for op in (ours, grouped))
        yield Row.of(
            f"experts E {num_experts}, K 2 / cuBLAS dense of equal FLOPs", run_ours, run_dense, EXPERTS_AT_MOST
        )
        yield Row.of(f"experts E {num_experts}, K 2 / torch grouped_mm", run_ours, run_grouped)


def head() -> Iterator[Row]:
    """Against torch's head and cross-entropy over all logits."""
    for vocabulary in (32768, 131072):
        x, weight = random_bf16(8192, 1024), random_bf16(vocabulary, 1024) * 0.03
        targets = torch.randint(0, vocabulary, (8192,), device="cuda")
        runs = [
            trained(op, (x, weight))
            for op in (
                lambda x, w, t=targets: fused_linear_cross_entropy(x, w, t),
                lambda x, w, t=targets: F.cross_entropy(F.linear(x, w).float(), t),
            )
        ]
        yield Row.of(f"head and cross-entropy, V {vocabulary} / torch, all logits", *runs)


def ceilings() -> dict[str, float]:
    """What this card copies and multiplies at most, measured."""
    block, square = torch.empty(1 << 28, device="cuda", dtype=torch.float32), random_bf16(8192, 8192)
    other = torch.empty_like(block)
    copy_ms, multiply_ms = median_ms(lambda: other.copy_(block)), median_ms(lambda: square @ square)
    return {
        "copy_GB_per_s": 2 * block.numel() * 4 / copy_ms / 1e6,
        "matmul_bf16_TFLOP_per_s": 2 * 8192**3 / multiply_ms / 1e9,
    }


def surroundings() -> dict[str, object]:
    """GPU, driver, versions, commit and date: without them a figure says nothing."""
    import triton

    def said(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": said("git", "rev-parse", "--short=12", "HEAD"),
        "changed_files": bool(said("git", "status", "--porcelain", "--untracked-files=no", "--", "kernels")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timer": "CUDA events, medians; one process",
    }


PARTS = {"attention": attention, "experts": experts, "head": head}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "gpu.json", help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="measure these parts alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels/bench/gpu.py: needs a CUDA GPU and finds none; nothing was checked or timed", file=sys.stderr)
        return 2
    wrong = faults((torch.bfloat16, torch.float16, torch.float32))
    if wrong:
        print("nothing was timed, because results are wrong:\n  " + "\n  ".join(wrong), file=sys.stderr)
        return 2
    about = surroundings() | {"ceilings": ceilings()}
    print("  ".join(f"{name}: {value}" for name, value in about.items()))
    print(f"{'':<66}{'ours ms':>9}{'other ms':>9}{'':>8}{'recorded':>9}")
    rows = []
    for name in arguments.only:
        for row in PARTS[name]():
            rows.append(row)
            print(row.line(), flush=True)
    missed = [row.what for row in rows if row.missed]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    results = [
        asdict(row)
        | {"ratio": row.ours_ms / row.other_ms, "recorded_ratio": row.ours_recorded_ms / row.other_recorded_ms}
        | {"missed": row.missed}
        for row in rows
    ]
    arguments.out.write_text(json.dumps({"surroundings": about, "missed": missed, "rows": results}, indent=1) + "\n")
    print(f"{len(missed)} MISSED: {'; '.join(missed)}" if missed else "every target hit")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
