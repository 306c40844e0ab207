"""What is between the matrix products of a block, in one pass of compiled code each way: float32 on the CPU.

Scores are (pairs, keys, rows), the other way round than in torch_sticks.py, so that sticks are broken for a vector of
rows at once. Not used where there is no compiler (native.py) or a block has more rows than sticks.c keeps in registers'
reach.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mfext_kernels.native import build
from mfext_kernels.stickbreaking.blocks import QUERIES, Block, Gradients, Operands, Plan

SOURCE = Path(__file__).with_name("sticks.c")
MOST_ROWS = 512
NEVER = 2**31 - 1


class _Sight(ctypes.Structure):
    _fields_ = (
        ("since", ctypes.c_void_p),
        ("until", ctypes.c_void_p),
        ("all_since", ctypes.c_int32),
        ("all_until", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("used_up", ctypes.c_float),
    )


def applies(queries: Tensor, plan: Plan) -> bool:
    """Whether a call with such folded queries goes this way."""
    fits = queries.dtype == torch.float32 and queries.device.type == "cpu" and plan.chosen * QUERIES <= MOST_ROWS
    return fits and available()


def available() -> bool:
    """Whether it can be built here."""
    return build(SOURCE).loaded is not None


def explain() -> str:
    """What it was built with, or why it was not."""
    return build(SOURCE).reason


class CompiledSticks:
    """Breaks the sticks of one call's blocks. The equations are in cpu.py, the passes in sticks.c."""

    def __init__(self, plan: Plan, like: Tensor, num_keys: int, forward: bool) -> None:
        self._plan, self._buffers = plan, plan.scratch(like, num_keys, 1 if forward else 3)
        rows_R = torch.arange(min(QUERIES, plan.length) * plan.chosen, dtype=torch.int32) // plan.chosen
        self._back_R = rows_R.flip(0).contiguous()
        self._never_R = torch.full_like(rows_R, NEVER)

    def attend(self, block: Block, first: int, tile: Operands, out_XRC: Tensor, left_XR: Tensor | None) -> Tensor:
        """Add what the block's keys from number `first` on give to `out`; what is left of each stick (pairs, rows)."""
        (weights_XSR,) = self._views(tile)
        torch.bmm(tile.keys_XSC, tile.queries_XRC.transpose(1, 2), out=weights_XSR)
        sticks_XR = weights_XSR.new_ones(out_XRC.shape[:2]) if left_XR is None else left_XR
        _pass("mfext_break_sticks", (weights_XSR, sticks_XR), self._sight(block, first))
        if left_XR is None:
            torch.bmm(weights_XSR.transpose(1, 2), tile.values_XSC, out=out_XRC)
        else:
            out_XRC.baddbmm_(weights_XSR.transpose(1, 2), tile.values_XSC)
        return sticks_XR

    def differentiate(self, block: Block, operands: Operands, grads: Gradients) -> None:
        """Write the block's gradients, or add them, over all keys that forward met."""
        queries, keys, values, grad_out = operands.parts()
        scores_XSR, slopes_XSR, weights_XSR = self._views(operands)
        torch.bmm(keys, queries.transpose(1, 2), out=scores_XSR)
        torch.bmm(values, grad_out.transpose(1, 2), out=slopes_XSR)
        _pass("mfext_mend_sticks", (scores_XSR, slopes_XSR, weights_XSR), self._sight(block, 0))
        grads.values_XSC.baddbmm_(weights_XSR, grad_out)
        torch.bmm(slopes_XSR.transpose(1, 2), keys, out=grads.queries_XRC)
        grads.keys_XSC.baddbmm_(slopes_XSR, queries, alpha=-1)

    def _sight(self, block: Block, first: int) -> tuple[_Sight, Tensor, Tensor]:
        """Which keys a block's rows see, with the tensors it points to."""
        num_queries = block.last - block.first
        since_R = self._back_R[-num_queries * self._plan.chosen :]
        until_R, all_until = self._never_R, NEVER
        if block.starts is not None:
            seen = self._plan.num_keys - block.newest - block.starts.clamp(min=0)
            until_R = seen.to(torch.int32).repeat_interleave(self._plan.chosen)
            all_until = block.masked_from
        used_up = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps ** 2  # as in torch_sticks.py
        sight = _Sight(since_R.data_ptr(), until_R.data_ptr(), num_queries - 1, all_until, first, used_up)
        return sight, since_R, until_R

    def _views(self, operands: Operands) -> list[Tensor]:
        pairs, rows, _ = operands.queries_XRC.shape
        shape = (pairs, operands.keys_XSC.shape[1], rows)
        return [buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in self._buffers]


def _pass(name: str, blocks: tuple[Tensor, ...], sight: tuple[_Sight, Tensor, Tensor]) -> None:
    """Run one pass over contiguous blocks, pairs first, shared out among torch's threads."""
    pairs, keys, rows = blocks[0].shape
    function = _function(name)
    threads = min(torch.get_num_threads(), pairs)

    def run(first: int, last: int) -> None:
        function(*(block[first].data_ptr() for block in blocks), ctypes.byref(sight[0]), last - first, keys, rows)

    if threads == 1:
        run(0, pairs)
    else:
        bounds = [pairs * each // threads for each in range(threads + 1)]
        list(_pool(threads).map(run, bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "sticks")


@cache
def _function(name: str) -> Callable[..., None]:
    library = build(SOURCE).loaded
    assert library is not None, "ask available() first"
    function = library[name]
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * (3 if name == "mfext_break_sticks" else 4) + [ctypes.c_int32] * 3
    return function
