"""Bits per byte and forgetting as torchmetrics classes, for anyone's training loop; sums are reduced over processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from mfext.errors import InputError


class BitsPerByte(Metric):
    """Loss in bits per UTF-8 byte: total nats / total bytes / ln 2, never a mean of batch means.

    `update(nats, num_bytes)` takes sums of any shape: the loss SUMMED (not averaged) over tokens, and the bytes of
    the text it covers. NaN before the first byte.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    num_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor | float, num_bytes: Tensor | float) -> None:
        """Add the summed loss in nats and the UTF-8 bytes of some text."""
        self.nats += torch.as_tensor(nats, dtype=torch.float64, device=self.nats.device).detach().sum()
        self.num_bytes += torch.as_tensor(num_bytes, dtype=torch.float64, device=self.num_bytes.device).sum()

    def compute(self) -> Tensor:
        """Bits per byte (scalar, float64)."""
        return self.nats / self.num_bytes / math.log(2)


class Forgetting(Metric):
    """`forgetting.base` in bits per byte: mean over old domains of loss now minus loss of the untouched base.

    `update(domain, nats_before, nats_after, num_bytes)` takes sums over some text of old domain number `domain`, below
    `num_domains`. Domains without text are left out; NaN before the first. Divide by log2(e) for nats per byte.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    change_nats: Tensor
    num_bytes: Tensor

    def __init__(self, num_domains: int = 1) -> None:
        super().__init__()
        if num_domains < 1:
            raise InputError("Forgetting needs a domain", f"num_domains={num_domains}", "give at least 1")
        self.add_state("change_nats", torch.zeros(num_domains, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros(num_domains, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, domain: int, nats_before: Tensor | float, nats_after: Tensor | float, num_bytes: Tensor | float
    ) -> None:
        """Add two models' summed losses in nats on the same text, and its UTF-8 bytes."""
        if not 0 <= domain < self.num_bytes.numel():
            raise InputError("no such domain", f"domain={domain}", f"give 0 to {self.num_bytes.numel() - 1}")
        sums = [
            torch.as_tensor(value, dtype=torch.float64, device=self.num_bytes.device).detach().sum()
            for value in (nats_before, nats_after, num_bytes)
        ]
        self.change_nats[domain] += sums[1] - sums[0]
        self.num_bytes[domain] += sums[2]

    def compute(self) -> Tensor:
        """Mean change in bits per byte (scalar, float64), positive where the old domains got worse."""
        known = self.num_bytes > 0
        return (self.change_nats[known] / self.num_bytes[known]).mean() / math.log(2)
