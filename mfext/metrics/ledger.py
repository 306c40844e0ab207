"""The ledger: one raw measurement per (stage, step, domain, split), from which every number is derived.

Rows are sums (nats, tokens, UTF-8 bytes), never means, so that any mean can be weighted by tokens or bytes afterwards.
Stage 0 is the untouched base. This file writes nothing; the store appends `to_json()` lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mfext.errors import InputError

Key = tuple[int, int, str, str]
# exp of more nats per token than this is no float64.
MAX_NATS_PER_TOKEN = 709.0


def nats_per_byte(nats: float, num_bytes: int) -> float | None:
    """Byte-weighted mean of a summed loss; None where there is no byte."""
    return nats / num_bytes if num_bytes else None


def bits_per_byte(nats: float, num_bytes: int) -> float | None:
    """The same in bits."""
    return nats / num_bytes / math.log(2) if num_bytes else None


def perplexity(nats: float, tokens: int) -> float | None:
    """exp of the token-weighted mean of a summed loss; None without tokens or where it is no float64 any more."""
    return math.exp(nats / tokens) if tokens and nats / tokens < MAX_NATS_PER_TOKEN else None


@dataclass(frozen=True)
class LedgerRow:
    """The loss of one model on one split of one domain, as sums over documents.

    `nll_nats` is the sum over all text tokens; `document_nats` and `document_bytes` hold the same per document, in
    the split's fixed order, for paired intervals. `time` is ISO 8601, `wall_s` how long the measurement took.
    A row that contradicts itself (sums, counts, negative or non-finite numbers) raises ValueError.
    """

    stage: int
    step: int
    domain: str
    split: str
    nll_nats: float
    tokens: int
    bytes: int
    documents: int
    document_nats: tuple[float, ...]
    document_bytes: tuple[int, ...]
    split_sha256: str
    model_sha256: str
    seed: int
    wall_s: float
    time: str
    stage_name: str

    def __post_init__(self) -> None:
        finite = all(math.isfinite(nats) for nats in (*self.document_nats, self.nll_nats, self.wall_s))
        counts = (self.stage, self.step, self.tokens, self.bytes, self.documents, *self.document_bytes)
        checks = (
            (finite, "numbers that are not finite"),
            (min(counts) >= 0, "negative counts"),
            (len(self.document_nats) == len(self.document_bytes) == self.documents, "lists of another length"),
            (sum(self.document_bytes) == self.bytes, "document bytes that do not add up to `bytes`"),
            (
                not finite or math.isclose(math.fsum(self.document_nats), self.nll_nats, rel_tol=1e-9, abs_tol=1e-9),
                "document losses that do not add up to `nll_nats`",
            ),
        )
        for holds, what in checks:
            if not holds:
                raise ValueError(f"ledger row of stage {self.stage}, domain {self.domain!r}: {what}")

    @property
    def key(self) -> Key:
        """What makes a row unique: (stage, step, domain, split)."""
        return self.stage, self.step, self.domain, self.split

    @property
    def nats_per_byte(self) -> float | None:
        """Byte-weighted mean loss; None where no byte was scored."""
        return nats_per_byte(self.nll_nats, self.bytes)

    @property
    def bits_per_byte(self) -> float | None:
        """The same in bits."""
        return bits_per_byte(self.nll_nats, self.bytes)

    @property
    def perplexity(self) -> float | None:
        """exp of the token-weighted mean loss; None where no token was scored."""
        return perplexity(self.nll_nats, self.tokens)

    def to_json(self) -> dict[str, Any]:
        """One plain JSON object; `from_json` gives back an equal row."""
        return {**asdict(self), "document_nats": list(self.document_nats), "document_bytes": list(self.document_bytes)}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> LedgerRow:
        """Read `to_json()`'s object; InputError where a key is missing, unknown or wrong."""
        where = f"ledger row {[line.get(name) for name in ('stage', 'step', 'domain', 'split')]}"
        expected = {entry.name: str(entry.type) for entry in fields(cls)}
        if expected.keys() != line.keys():
            names = sorted(expected.keys() ^ line.keys())
            raise InputError(f"keys missing or unknown: {', '.join(names)}", where, "restore the run's ledger.jsonl")
        try:
            return cls(**{name: _read(kind, name, line[name]) for name, kind in expected.items()})
        except ValueError as error:
            raise InputError("unusable ledger row", where, f"{error}; restore the run's ledger.jsonl") from error


def _read(kind: str, name: str, value: object) -> Any:
    if kind == "str" and isinstance(value, str):
        return value
    if kind in ("int", "float"):
        return _read_number(kind, name, value)
    if kind.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(_read_number("int" if "int" in kind else "float", name, item) for item in value)
    raise ValueError(f"{name}={value!r} is not of type {kind}")


def _read_number(kind: str, name: str, value: object) -> int | float:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if kind == "int" else float(value)
    if isinstance(value, float) and kind == "float":
        return value
    raise ValueError(f"{name}={value!r} is not of type {kind}")


@dataclass(frozen=True)
class Ledger:
    """All rows of a run, immutable; keys are unique and a split's documents never change.

    InputError where two rows share a key or where one (domain, split) was measured on different documents.
    """

    rows: tuple[LedgerRow, ...] = ()
    _by_key: dict[Key, LedgerRow] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        first: dict[tuple[str, str], LedgerRow] = {}
        for row in self.rows:
            if row.key in self._by_key:
                raise InputError("two ledger rows with one key (stage, step, domain, split)", row.key, "keep one")
            self._by_key[row.key] = row
            known = first.setdefault((row.domain, row.split), row)
            if (known.split_sha256, known.document_bytes) != (row.split_sha256, row.document_bytes):
                where = f"{row.split} split of {row.domain!r}, stages {known.stage} and {row.stage}"
                fix = "evaluate every stage on the same data with the same evaluation.max_bytes"
                raise InputError("stages were measured on different documents", where, fix)

    @classmethod
    def from_json(cls, lines: Iterable[Mapping[str, Any]]) -> Ledger:
        """Read the objects of ledger.jsonl."""
        return cls(tuple(LedgerRow.from_json(line) for line in lines))

    def __iter__(self) -> Iterator[LedgerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Iterable[LedgerRow]) -> Ledger:
        """A new ledger with `rows` at the end."""
        return Ledger((*self.rows, *rows))

    def at(self, stage: int, domain: str, split: str) -> LedgerRow | None:
        """The last measurement (highest step) of `domain` in `stage`, or None."""
        found = [row for row in self.rows if (row.stage, row.domain, row.split) == (stage, domain, split)]
        return max(found, key=lambda row: row.step, default=None)

    @property
    def num_stages(self) -> int:
        """Highest stage measured, plus one (stage 0 counts)."""
        return max((row.stage for row in self.rows), default=-1) + 1
