"""What `eval --switch` measures. Checks as in config.py; requests.py gathers this into an EvalRequest."""

from __future__ import annotations

from dataclasses import dataclass

from mfext.config_checks import require, require_at_least


@dataclass(frozen=True)
class SwitchConfig:
    """Documents that change domain half-way and back, and documents cut short; measured where `on`.

    A region of a switching document has `bytes` UTF-8 bytes or up to three fewer (whole characters); short documents
    are cut to each of `short_bytes` likewise. `documents` of every kind are measured, or as many as the text gives.
    """

    on: bool = False
    bytes: int = 256
    short_bytes: tuple[int, ...] = (16, 32, 64, 128)
    documents: int = 64

    def __post_init__(self) -> None:
        # A character has up to four bytes: a shorter region might hold none.
        require_at_least(4, self, "bytes")
        require_at_least(1, self, "documents")
        lengths = self.short_bytes
        require(self, "short_bytes", bool(lengths) and min(lengths) >= 4, "one length or more, each at least 4")
        require(self, "short_bytes", tuple(sorted(set(lengths))) == lengths, "rising")
