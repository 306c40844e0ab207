"""The knobs of each continual-learning method beside those all of them share (training, growth).

Checks as in config.py, which gathers these into a Recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mfext.config_checks import require, require_at_least, require_choices


@dataclass(frozen=True)
class ReplayConfig:
    """Old text mixed into every stage: `rate` of the windows come from a buffer that keeps `buffer_share` of each
    old domain's bytes, at most `buffer_bytes` a domain."""

    rate: float = 0.125
    buffer_share: float = 0.01
    buffer_bytes: int = 262_144

    def __post_init__(self) -> None:
        require(self, "rate", 0 < self.rate < 1, "a share of the windows between 0 and 1")
        require(self, "buffer_share", 0 < self.buffer_share <= 1, "a share of the text above 0, at most 1")
        require_at_least(1, self, "buffer_bytes")


@dataclass(frozen=True)
class EwcConfig:
    """Elastic weight consolidation: `strength` multiplies the Fisher-weighted squared distance from the previous
    stage's weights; the diagonal Fisher is estimated on `windows` windows of every domain learned before, one gradient
    a window, and an older stage's counts `decay` times as much as the next one's."""

    strength: float = 1e4
    windows: int = 128
    decay: float = 1.0

    def __post_init__(self) -> None:
        require(self, "strength", self.strength > 0, "positive")
        require(self, "decay", 0 < self.decay <= 1, "above 0, at most 1")
        require_at_least(1, self, "windows")


@dataclass(frozen=True)
class LwfConfig:
    """Learning without forgetting: `strength` multiplies the cross-entropy against the previous stage's model on the
    new text, both softened by `temperature`."""

    strength: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for key in ("strength", "temperature"):
            require(self, key, getattr(self, key) > 0, "positive")


@dataclass(frozen=True)
class ConcentrateConfig:
    """Load concentration: `weight` multiplies the marginal entropy (nats, summed over the routers of these `kinds`);
    it rises linearly from 0 over the first `rise_share` of a stage."""

    weight: float = 0.03
    rise_share: float = 0.2
    kinds: Literal["both", "attention", "feedforward"] = "both"

    def __post_init__(self) -> None:
        require_choices(self)
        require(self, "weight", self.weight > 0, "positive")
        require(self, "rise_share", 0 <= self.rise_share <= 1, "a share of the stage from 0 to 1")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on attention (queries, keys, values, outputs) and on the feed-forward experts, merged into the
    weights when a stage ends. The update is `alpha / rank` times left @ right."""

    rank: int = 16
    alpha: float = 32.0
    routers: bool = False
    embedding_and_head: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, self, "rank")
        require(self, "alpha", self.alpha > 0, "positive")


@dataclass(frozen=True)
class ExpandConfig:
    """Block expansion: `blocks` copies of existing layers, spread evenly and started as the identity, per stage."""

    blocks: int = 1

    def __post_init__(self) -> None:
        require_at_least(1, self, "blocks")
