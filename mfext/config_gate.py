"""The shape of a domain gate. Checks as in config.py, which gathers this into a model's config."""

from __future__ import annotations

from dataclasses import dataclass

from mfext.config_checks import require, require_at_least


@dataclass(frozen=True)
class DomainGateConfig:
    """Shape of one causal domain gate, and where its probability opens it.

    The gate is exactly 0 below `opens_at`, exactly 1 above `full_at`, linear between.
    """

    d_embedding: int = 32
    d_convolution: int = 128
    convolution_width: int = 8
    decays: tuple[float, ...] = (0.8, 0.9, 0.96, 0.99)
    d_hidden: int = 64
    opens_at: float = 0.5
    full_at: float = 0.95

    def __post_init__(self) -> None:
        require_at_least(1, self, "d_embedding", "d_convolution", "convolution_width", "d_hidden")
        require(self, "decays", all(0 < decay < 1 for decay in self.decays), "between 0 and 1")
        require(self, "opens_at", 0 <= self.opens_at < self.full_at, f"from 0 to below full_at ({self.full_at})")
        require(self, "full_at", self.full_at <= 1, "at most 1")
