"""Block sizes of the Triton kernels by kind of GPU: a table, so that a kernel's results never depend on a race.

sm_90 in 16 bits: the best of what `python kernels/bench/tune.py` tried on an H200 (2026-11-26). The others are starting
values from ahead-of-time compilation alone: every kernel fits its kind's shared memory, and in 16 bits ptxas keeps its
numbers in registers (fp32, computed exactly, spills at heads of 128). What they give: `python kernels/bench/gpu.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Op = Literal[
    "attention_forward",
    "attention_backward",
    "attention_decode",
    "wide_forward",
    "wide_backward",
    "wide_decode",
    "rows",
    "back",
    "weights",
    "cross_entropy",
]
NARROW = 64  # numbers of a row
FEW_COLUMNS = 192  # of a product


@dataclass(frozen=True)
class Config:
    """A tile of `rows` x `columns`, read `depth` at a time where it is a product, by `warps` in `stages`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Of an op: 16 bits a number in rows of at most NARROW numbers (products: FEW_COLUMNS); in wider rows; and 32 bits,
# which need the room of two.
Sizes = tuple[Config, Config, Config]
# A warp a row, so that a scan never leaves its warp; and where a pair has K rows alone, long tiles: few steps in turn.
_WIDE, _WIDE_DECODE = Config(4, 256, 0, 4, 1), Config(1, 1024, 0, 4, 1)
_WIDE_HEADS: Mapping[Op, Sizes] = {
    "wide_forward": (_WIDE, _WIDE, _WIDE),
    "wide_backward": (_WIDE, _WIDE, _WIDE),
    "wide_decode": (_WIDE_DECODE, _WIDE_DECODE, _WIDE_DECODE),
}
# Bound by memory: as many numbers a thread as two loads of 16 bytes bring.
_BACK: Sizes = (Config(16, 128, 0, 4, 1), Config(4, 512, 0, 4, 1), Config(4, 256, 0, 4, 1))
_SMALL: Mapping[Op, Sizes] = {
    **_WIDE_HEADS,
    "back": _BACK,
    "attention_forward": (Config(64, 32, 0, 4, 2), Config(64, 32, 0, 8, 2), Config(64, 32, 0, 8, 1)),
    "attention_backward": (Config(64, 32, 0, 4, 2), Config(64, 32, 0, 8, 2), Config(32, 32, 0, 8, 1)),
    "attention_decode": (Config(16, 64, 0, 4, 2), Config(16, 64, 0, 4, 1), Config(16, 32, 0, 4, 1)),
    "rows": (Config(64, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(64, 64, 16, 8, 2)),
    "weights": (Config(64, 64, 32, 4, 3), Config(64, 64, 32, 4, 3), Config(64, 64, 16, 8, 2)),
    "cross_entropy": (Config(1, 2048, 0, 4, 1), Config(1, 2048, 0, 4, 1), Config(1, 2048, 0, 4, 1)),
}
_LARGE: Mapping[Op, Sizes] = {
    **_WIDE_HEADS,
    "back": _BACK,
    "attention_forward": (Config(128, 64, 0, 8, 3), Config(128, 64, 0, 8, 2), Config(64, 32, 0, 8, 2)),
    "attention_backward": (Config(64, 32, 0, 4, 2), Config(64, 32, 0, 8, 2), Config(32, 32, 0, 8, 1)),
    "attention_decode": (Config(16, 128, 0, 4, 2), Config(16, 64, 0, 4, 2), Config(16, 32, 0, 4, 2)),
    "rows": (Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 3), Config(64, 64, 16, 8, 2)),
    "weights": (Config(128, 128, 64, 8, 3), Config(128, 128, 64, 8, 3), Config(64, 64, 16, 8, 2)),
    "cross_entropy": (Config(1, 4096, 0, 8, 1), Config(1, 4096, 0, 8, 1), Config(1, 4096, 0, 8, 1)),
}
_SM_90: Mapping[Op, Sizes] = {
    **_LARGE,
    "attention_forward": (Config(64, 32, 0, 4, 3), Config(64, 32, 0, 4, 2), Config(64, 32, 0, 8, 2)),
    "attention_backward": (Config(64, 64, 0, 4, 2), Config(64, 64, 0, 4, 2), Config(32, 32, 0, 8, 1)),
    "rows": (Config(128, 128, 64, 4, 3), Config(128, 256, 64, 8, 3), Config(64, 64, 16, 8, 2)),
    "weights": (Config(128, 128, 32, 8, 4), Config(128, 256, 64, 8, 3), Config(64, 64, 16, 8, 2)),
}
# Tiny, so that small tests have several tiles in every direction, the last of them in part.
_TINY = Config(16, 16, 16, 1, 1)
_TINY_FORWARD = Config(32, 16, 0, 1, 1)  # other blocks of rows than backward's, so that neither relies on the other's
_TINY_DECODE = Config(2, 32, 0, 1, 1)
_INTERPRETER: Mapping[Op, Sizes] = {
    "attention_forward": (_TINY_FORWARD, _TINY_FORWARD, _TINY_FORWARD),
    "attention_backward": (_TINY, _TINY, _TINY),
    "attention_decode": (_TINY, _TINY, _TINY),
    "wide_forward": (_TINY_FORWARD, _TINY_FORWARD, _TINY_FORWARD),
    "wide_backward": (_TINY, _TINY, _TINY),
    "wide_decode": (_TINY_DECODE, _TINY_DECODE, _TINY_DECODE),
    "rows": (_TINY, _TINY, _TINY),
    "back": (_TINY, _TINY, _TINY),
    "weights": (_TINY, _TINY, _TINY),
    "cross_entropy": (_TINY, _TINY, _TINY),
}
TABLE: Mapping[str, Mapping[Op, Sizes]] = {
    "sm_80": _LARGE,
    "sm_90": _SM_90,
    "sm_100": _LARGE,
    "default": _SMALL,
    "interpreter": _INTERPRETER,
}


def config_for(op: Op, tensor: Tensor, width: int = NARROW) -> Config:
    """The table's entry for rows of `width` numbers of the tensor's dtype on the tensor's device."""
    return pick(kind_of(tensor.device), op, tensor.element_size(), width)


def pick(kind: str, op: Op, number_bytes: int, width: int = NARROW) -> Config:
    """The entry of one kind of GPU; a kind that is not in the table gets the default's."""
    narrow, wide, exact = TABLE.get(kind, TABLE["default"])[op]
    most = FEW_COLUMNS if op in ("rows", "weights", "back") else NARROW
    return exact if number_bytes > 2 else narrow if width <= most else wide


@cache
def kind_of(device: torch.device) -> str:
    """The table's name of a device."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
