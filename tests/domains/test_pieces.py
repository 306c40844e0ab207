from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.domains.pieces import Piece, carve, cut, cut_code, runs_of, shared_runs, split_of, without_leaks
from mfext.errors import InputError

TEXT = st.text(alphabet="ab \n\r", max_size=200)


@settings(max_examples=100, deadline=None)
@given(TEXT, st.integers(1, 40))
def test_pieces_joined_are_the_text_again_and_only_a_blank_text_has_blank_pieces(text: str, piece_bytes: int) -> None:
    pieces = cut(text, piece_bytes)
    assert "".join(pieces) == text
    assert all(piece.strip() for piece in pieces) or not text.strip()


def test_blocks_are_gathered_up_to_the_size_and_a_long_block_stays_whole() -> None:
    assert cut("aa\n\nbb\n\n" + "c" * 30 + "\n\ndd", 8) == ["aa\n\nbb\n\n", "c" * 30 + "\n\n", "dd"]


def test_code_is_cut_before_top_level_lines_and_only_a_huge_class_inside() -> None:
    source = "class A:\n    x = 1\n\n    y = 2\n\n\ndef f():\n    pass\n"
    assert cut_code(source, 30) == ["class A:\n    x = 1\n\n    y = 2\n\n\n", "def f():\n    pass\n"]
    assert "".join(cut_code(source, 8)) == source
    assert cut_code(source, 8)[1].startswith("    y = 2")


def test_a_name_always_falls_into_the_same_split_and_about_a_tenth_is_held_out() -> None:
    splits = [split_of(f"module:{number}") for number in range(4000)]
    assert splits == [split_of(f"module:{number}") for number in range(4000)]
    for split in ("validation", "test"):
        assert 0.035 < splits.count(split) / 4000 < 0.065


def test_a_near_copy_is_recognised_with_other_indentation() -> None:
    seen = set(runs_of("".join(f"line {number}\n" for number in range(20)), 3))
    copy = "".join(f"    line {number}\n" for number in range(15)) + "other\n"
    assert shared_runs(runs_of(copy, 3), seen) > 0.7
    assert shared_runs(runs_of("something\nelse\nentirely\n", 3), seen) == 0


def test_an_evaluation_piece_partly_in_train_is_dropped_and_train_is_kept() -> None:
    text = "".join(f"line {number}\n" for number in range(40))
    half = "".join(f"line {number}\n" for number in range(20)) + "".join(f"new {number}\n" for number in range(20))
    fresh = "".join(f"fresh {number}\n" for number in range(20))
    pieces = [Piece("v", "validation", half), Piece("t", "train", text), Piece("w", "test", fresh)]
    assert [piece.name for piece in without_leaks(pieces, 3)] == ["t", "w"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=60, max_size=200), st.randoms(use_true_random=False))
def test_carved_splits_hold_every_document_once_keep_copies_together_and_ignore_order(numbers, random) -> None:
    documents = [f"text {number}" for number in [*numbers, *range(10)]]
    splits = carve(tuple(documents), ("validation", "test"), "here")
    assert sorted(sum(splits.values(), ())) == sorted(documents)
    assert not set(splits["train"]) & (set(splits["validation"]) | set(splits["test"]))
    assert not set(splits["validation"]) & set(splits["test"])
    assert all(splits.values())
    random.shuffle(documents)
    again = carve(tuple(documents), ("validation", "test"), "here")
    assert {name: set(part) for name, part in again.items()} == {name: set(part) for name, part in splits.items()}


def test_too_few_different_documents_cannot_be_split() -> None:
    with pytest.raises(InputError, match="2 different documents cannot be split into train and validation and test"):
        carve(("a", "b", "a "), ("validation", "test"), "here")
