"""MKL's products against oneDNN's on this processor: `python kernels/bench/products.py` (half a minute on one thread).

GFLOP/s of both by rows and matrix, and what a shape costs that was not met before. Where they cross is the rule of
mfext_kernels/products.py.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from mfext_kernels import products

ROWS = (16, 32, 64, 128, 512, 2048)
MATRICES = ((64, 64), (256, 64), (128, 256), (256, 256), (256, 512), (512, 2048))
NEW_SHAPES = range(101, 400, 3)
Product = Callable[[Tensor, Tensor], Tensor]


def onednn(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """One call, whatever the sizes."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left_MK, right_KN.t(), None, "none", [], "")
    return found


def gflops(product: Product, left_MK: Tensor, right_KN: Tensor) -> float:
    """The median of many calls."""
    work = 2 * left_MK.numel() * right_KN.shape[1]
    return work / 1e9 / statistics.median(seconds(product, [(left_MK, right_KN)] * max(9, 200_000_000 // work))[3:])


def seconds(product: Product, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Process CPU time of every call."""
    taken = []
    for left, right in pairs:
        start = time.process_time()
        product(left, right)
        taken.append(time.process_time() - start)
    return taken


def main() -> None:
    torch.set_num_threads(1)
    print(products.explain(), "  torch", torch.__version__)
    print("matrix      rows   x W: MKL  oneDNN   gradient of x: MKL  oneDNN   of W: MKL  oneDNN   GFLOP/s")
    for inner, columns in MATRICES:
        weight = torch.randn(inner, columns)
        for rows in ROWS:
            x, grad = torch.randn(rows, inner), torch.randn(rows, columns)
            found = [
                gflops(each, left, right)
                for left, right in ((x, weight), (grad, weight.t()), (x.t(), grad))
                for each in (torch.mm, onednn)
            ]
            print(f"{inner:4} x {columns:<4} {rows:5}" + "".join(f"{each:12.0f}" for each in found), flush=True)
    weight, x = torch.randn(272, 272), torch.randn(NEW_SHAPES.stop, 272)
    for name, each in (("MKL", torch.mm), ("oneDNN", onednn), ("chosen here", products.product)):
        rounds = [statistics.median(seconds(each, [(x[:rows], weight) for rows in NEW_SHAPES])) for _ in range(2)]
        print(f"{name}: a shape not met before {rounds[0] * 1e6:.0f} us, met again {rounds[1] * 1e6:.0f} us")


if __name__ == "__main__":
    main()
