"""Replay: full fine-tuning that keeps reading a little old text (Robins 1995, "Catastrophic forgetting, rehearsal
and pseudorehearsal"; for language models de Masson d'Autume et al. 2019, arXiv 1906.01076)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mfext.training.methods.full import Full


@dataclass(frozen=True)
class Replay(Full):
    """Trains every parameter. All that differs from `Full` is the stream: domains.replay_stream.ReplayStream."""

    trains: ClassVar[str] = "every parameter; a share of the windows comes from a small buffer of old text"
    name: str = "replay"
