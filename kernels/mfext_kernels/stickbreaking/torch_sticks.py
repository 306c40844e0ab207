"""What is between the matrix products of a block, in torch: any dtype, any device. Scores are (pairs, rows, keys)."""

from __future__ import annotations

import torch
from torch import Tensor

from mfext_kernels.stickbreaking.blocks import Block, Gradients, Operands, Plan


class TorchSticks:
    """Breaks the sticks of one call's blocks. The equations are in cpu.py."""

    def __init__(self, plan: Plan, like: Tensor, num_keys: int) -> None:
        self._plan, self._buffers = plan, plan.scratch(like, num_keys, 3)
        self._ahead_of: dict[int, Tensor] = {}

    def attend(self, block: Block, first: int, tile: Operands, out_XRC: Tensor, left_XR: Tensor | None) -> Tensor:
        """Add what the block's keys from number `first` on give to `out`; what is left of each stick (pairs, rows)."""
        queries, keys, values = tile.queries_XRC, tile.keys_XSC, tile.values_XSC
        left, stick, weights = self._views(tile)
        torch.bmm(queries, keys.transpose(1, 2), out=left)
        self._mask(left, block, first)
        _break_stick(left.sigmoid_(), stick, weights, left_XR)
        if left_XR is None:
            torch.bmm(weights, values, out=out_XRC)
        else:
            out_XRC.baddbmm_(weights, values)
        return stick[..., -1].clone()

    def differentiate(self, block: Block, operands: Operands, grads: Gradients) -> None:
        """Write the block's gradients, or add them, over all keys that forward met."""
        queries, keys, values, grad_out = operands.parts()
        left, total, grad = self._views(operands)
        torch.bmm(queries, keys.transpose(1, 2), out=left)
        self._mask(left, block, 0)
        _break_stick(left.sigmoid_(), total, grad, None)
        grads.values_XSC.baddbmm_(grad.transpose(1, 2), grad_out)
        torch.bmm(grad_out, values.transpose(1, 2), out=total)
        grad.mul_(total)  # g
        torch.cumsum(grad, -1, out=total)
        total.sub_(total[..., -1:].clone())  # minus the sum of g over strictly older keys
        grad.sub_(total)  # the sum over j <= m of g_j
        total.addcmul_(left, grad)  # dl = p * sum - older sum, the same as g - sigmoid(l) * sum
        torch.bmm(total, keys, out=grads.queries_XRC)
        grads.keys_XSC.baddbmm_(total.transpose(1, 2), queries, alpha=-1)

    def _mask(self, logits_XRS: Tensor, block: Block, first: int) -> None:
        """Make -l infinite, and so p = 1, where a key is invisible; column 0 is the block's key number `first`.

        Adding infinity takes a quarter of masked_fill_'s time: a broadcast mask is walked one element at a time there.
        """
        num_queries, num_keys = block.last - block.first, logits_XRS.shape[-1]
        by_query = logits_XRS.view(logits_XRS.shape[0], num_queries, self._plan.chosen, num_keys)
        if first < num_queries:
            newest = self._ahead(num_queries, logits_XRS)[..., first : first + num_keys]
            by_query[..., : newest.shape[-1]].add_(newest)
        skipped = max(0, block.masked_from - first)
        if block.starts is not None and skipped < num_keys:
            newest_key = self._plan.num_keys - 1 - block.newest - first
            keys = torch.arange(newest_key - skipped, newest_key - num_keys, -1, device=logits_XRS.device)
            before = (keys < block.starts.unsqueeze(1)).unsqueeze(1)
            by_query[..., skipped:].add_(logits_XRS.new_zeros(before.shape).masked_fill_(before, float("inf")))

    def _ahead(self, num_queries: int, like: Tensor) -> Tensor:
        """Infinity where a block's newest keys (reversed) lie ahead of a query, else 0, shaped (queries, 1, keys)."""
        if num_queries not in self._ahead_of:
            ahead = like.new_full((num_queries, num_queries), float("inf")).triu_(1)
            self._ahead_of[num_queries] = ahead.flip(1).unsqueeze(1)
        return self._ahead_of[num_queries]

    def _views(self, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
        pairs, rows, _ = operands.queries_XRC.shape
        shape = (pairs, rows, operands.keys_XSC.shape[1])
        left, second, third = (buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in self._buffers)
        return left, second, third


def _break_stick(left: Tensor, stick: Tensor, weights: Tensor, left_before: Tensor | None) -> None:
    """From p fill the stick left c and the weights a_r = c_{r-1} - c_r; c_{-1} is 1 or what newer tiles left.

    A stick below tiny / eps^2 (8e-25 in fp32) counts as used up. By then the weights sum to 1 to far more digits than
    the type has, and what follows would be arithmetic on subnormal numbers, many times slower on some processors.
    """
    numbers = torch.finfo(stick.dtype)
    used_up = numbers.tiny / numbers.eps**2
    if left_before is None:
        torch.cumprod(left, -1, out=stick)
        torch.threshold_(stick, used_up, 0.0)
        weights[..., 0] = 1.0 - stick[..., 0]
    else:
        left[..., 0] *= left_before
        torch.cumprod(left, -1, out=stick)
        torch.threshold_(stick, used_up, 0.0)
        weights[..., 0] = left_before - stick[..., 0]
    torch.sub(stick[..., :-1], stick[..., 1:], out=weights[..., 1:])
