from __future__ import annotations

import pytest

from mfext.domains.domain import Domain, check_no_overlap, first_documents, num_bytes, reservoir, split_hash
from mfext.errors import InputError


def domain(name: str, train: tuple[str, ...], validation: tuple[str, ...] = (), test: tuple[str, ...] = ()) -> Domain:
    return Domain(name, name, train, validation, test)


def test_the_split_hash_depends_on_order_and_on_where_documents_end() -> None:
    assert split_hash(["ab", "c"]) == split_hash(("ab", "c"))
    assert len({split_hash(part) for part in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [])}) == 5


def test_domains_without_shared_documents_pass_the_overlap_check() -> None:
    check_no_overlap([domain("a", ("one", "two"), ("three",)), domain("b", ("four",), ("five",), ("six",))])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_train_document_in_an_evaluation_split_of_another_domain_is_refused(split: str) -> None:
    trained = domain("new", ("fresh", "a  b\nc"))
    evaluated = (
        domain("old", ("x",), ("a b c",), ()) if split == "validation" else domain("old", ("x",), (), ("a b c",))
    )
    with pytest.raises(InputError, match=f"old/{split} and new/train, first: 'a b c'"):
        check_no_overlap([evaluated, trained])


def test_a_document_in_train_and_validation_of_one_domain_is_refused() -> None:
    with pytest.raises(InputError, match="1 documents of validation are also trained on"):
        check_no_overlap([domain("a", ("same",), ("same ",))])


def test_a_byte_cap_takes_whole_documents_from_the_front_and_at_least_one() -> None:
    documents = ("äöü", "four", "x")
    assert first_documents(documents, None) == documents
    assert first_documents(documents, 10) == ("äöü", "four")
    assert first_documents(documents, 9) == ("äöü",)
    assert first_documents(documents, 1) == ("äöü",)


def test_a_reservoir_fills_its_budget_exactly_and_ignores_the_order_of_documents() -> None:
    documents = tuple(f"document number {number} " * 5 for number in range(200))
    sample = reservoir(documents, 0.1, 10**6, seed=3)
    assert num_bytes(sample) == int(0.1 * num_bytes(documents))
    assert sample == reservoir(documents[::-1], 0.1, 10**6, seed=3)
    assert sample != reservoir(documents, 0.1, 10**6, seed=4)
    assert all(any(document.startswith(piece) for document in documents) for piece in sample)


def test_a_reservoir_never_exceeds_its_bytes_nor_cuts_inside_a_character() -> None:
    sample = reservoir(("ääää",), 1.0, 3, seed=0)
    assert sample == ("ä",)
    assert reservoir(("text",), 0.0, 100, seed=0) == ()
