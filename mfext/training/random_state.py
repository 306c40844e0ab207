"""Torch's random state as tensors, so that a resumed run draws what the uninterrupted one drew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def random_state(rank: int) -> dict[str, Tensor]:
    """This process's generators as `random/RANK/cpu` and, with a GPU in use, `random/RANK/cuda` (uint8)."""
    state = {f"random/{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random/{rank}/cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(state: Mapping[str, Tensor], rank: int) -> None:
    """Put back what `random_state` took; a process that has none of its own keeps its seed."""
    if f"random/{rank}/cpu" in state:
        torch.set_rng_state(state[f"random/{rank}/cpu"].cpu())
    if f"random/{rank}/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[f"random/{rank}/cuda"].cpu())


@contextmanager
def seeded(seed: int, stage: int, rank: int) -> Iterator[None]:
    """Random numbers a pure function of (seed, stage, rank); the caller's state comes back at the end."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed * 1_000_003 + stage * 1009 + rank)
        yield
