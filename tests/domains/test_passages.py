"""Passages have the size asked for, whole characters, and begin where documents begin."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.domains.passages import BETWEEN, cut_passages

TEXTS = st.lists(st.text(st.sampled_from("ab é€😀\n"), max_size=40), max_size=8)


@given(TEXTS, st.lists(st.integers(4, 20), min_size=1, max_size=3), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_parts_are_consecutive_whole_characters_of_the_size_asked_for(
    documents: list[str], sizes: list[int], count: int
) -> None:
    passages = cut_passages(documents, sizes, count)
    assert len(passages) <= count
    everything = BETWEEN.join(documents)
    for parts in passages:
        assert "".join(parts) in everything
        assert any("".join(parts).startswith(document[: len("".join(parts))]) for document in documents)
        for part, size in zip(parts, sizes, strict=True):
            assert size - 3 <= len(part.encode()) <= size


def test_one_passage_a_document_and_short_ones_go_on_with_their_successors() -> None:
    documents = ["one long document", "ab", "cd", "another that is long", "rest"]
    assert cut_passages(documents, (3, 3), 9) == (("one", " lo"), ("ab\n", "\ncd"), ("ano", "the"))
    assert cut_passages(documents, (3, 3), 1) == (("one", " lo"),)


def test_too_little_text_gives_no_passage() -> None:
    assert cut_passages(["short", "too"], (20,), 3) == ()
