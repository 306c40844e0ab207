"""Texts of a stated size cut out of a split: the parts that switching and short documents are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BETWEEN = "\n\n"


def cut_passages(documents: Sequence[str], sizes: Sequence[int], count: int) -> tuple[tuple[str, ...], ...]:
    """Up to `count` passages, in the split's order; each is as many consecutive parts as there are `sizes`.

    A part has `sizes[n]` UTF-8 bytes, or up to three fewer so that no character is cut. Every passage begins where a
    document begins; one too short goes on with those after it, a blank line between them.
    """
    passages: list[tuple[str, ...]] = []
    for text in _long_enough(documents, sum(sizes)):
        if len(passages) == count:
            break
        parts = []
        for size in sizes:
            parts.append(_first_bytes(text, size))
            text = text[len(parts[-1]) :]
        passages.append(tuple(parts))
    return tuple(passages)


def _first_bytes(text: str, num_bytes: int) -> str:
    """The longest beginning of `text` that takes no more than `num_bytes` bytes of UTF-8."""
    return text[:num_bytes].encode()[:num_bytes].decode(errors="ignore")


def _long_enough(documents: Sequence[str], num_bytes: int) -> Iterator[str]:
    """Documents, short ones joined to their successors until `num_bytes` are reached; a short rest is left out."""
    held: list[str] = []
    size = 0
    for document in documents:
        size += len(document.encode()) + (len(BETWEEN) if held else 0)
        held.append(document)
        if size >= num_bytes:
            yield BETWEEN.join(held)
            held, size = [], 0
