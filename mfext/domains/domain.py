"""What a domain is: three splits of documents that share nothing, and where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mfext.errors import InputError

Documents = tuple[str, ...]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Domain:
    """Text to learn, split by document.

    `source` is the reference as the user gave it. `notes` are one-line remarks the user should
    see (a split made here, duplicates). `provenance` is what a report needs to name the data
    exactly: versions, the split rule, and `{split}_sha256` of every split.
    """

    name: str
    source: str
    train: Documents
    validation: Documents
    test: Documents
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    def split(self, name: str) -> Documents:
        """The documents of `train`, `validation` or `test`."""
        assert name in SPLITS, name
        documents: Documents = getattr(self, name)
        return documents


def split_hash(documents: Iterable[str]) -> str:
    """SHA-256 (hex) over the documents in order; each is preceded by its length in bytes."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def split_hashes(train: Documents, validation: Documents, test: Documents) -> dict[str, str]:
    """The `{split}_sha256` entries of a provenance."""
    return {f"{name}_sha256": split_hash(part) for name, part in zip(SPLITS, (train, validation, test), strict=True)}


def document_key(document: str) -> bytes:
    """SHA-256 of a document with every run of white space taken as one space."""
    return hashlib.sha256(" ".join(document.split()).encode()).digest()


def num_bytes(documents: Iterable[str]) -> int:
    """UTF-8 bytes in all documents together."""
    return sum(len(document.encode()) for document in documents)


def duplicate_note(documents: Sequence[str], where: str) -> tuple[str, ...]:
    """One note when documents occur more than once (white space apart); nothing otherwise."""
    repeated = len(documents) - len({document_key(document) for document in documents})
    if not repeated:
        return ()
    return (f"{where}: {repeated} of {len(documents)} documents repeat an earlier one; all are kept",)


def first_documents(documents: Sequence[str], max_bytes: int | None) -> Documents:
    """Whole documents from the front while they fit into `max_bytes`; always at least one.

    Splits keep one fixed order, so a cap always measures the same documents.
    """
    if max_bytes is None:
        return tuple(documents)
    taken: list[str] = []
    total = 0
    for document in documents:
        total += len(document.encode())
        if taken and total > max_bytes:
            break
        taken.append(document)
    return tuple(taken)


def check_no_overlap(domain_list: Sequence[Domain]) -> None:
    """Refuse a document that is in a train split of any domain and in an evaluation split of any.

    Documents are compared with white space normalised. Raises InputError naming both splits,
    the number of documents and the first of them.
    """
    trained: dict[bytes, str] = {}
    for domain in domain_list:
        for document in domain.train:
            trained.setdefault(document_key(document), domain.name)
    for domain in domain_list:
        for split in ("validation", "test"):
            shared = [document for document in domain.split(split) if document_key(document) in trained]
            if shared:
                other = trained[document_key(shared[0])]
                excerpt = " ".join(shared[0].split())[:60]
                raise InputError(
                    f"{len(shared)} documents of {split} are also trained on",
                    f"{domain.name}/{split} and {other}/train, first: '{excerpt}'",
                    "a loss on text seen in training says nothing; remove them from one of the two",
                )


def reservoir(documents: Sequence[str], share: float, max_bytes: int, seed: int) -> Documents:
    """A deterministic sample of `share` of the bytes, at most `max_bytes`, in an order drawn by `seed`.

    The last document is cut at a character so that the budget is used in full. Depends only on
    the set of documents, the budget and the seed.
    """
    budget = min(max_bytes, int(share * num_bytes(documents)))
    salt = f"mfext-reservoir-1:{seed}:".encode()
    ranked = sorted(set(documents), key=lambda document: hashlib.sha256(salt + document.encode()).digest())
    taken: list[str] = []
    for document in ranked:
        if budget <= 0:
            break
        content = document.encode()[:budget]
        budget -= len(content)
        piece = content.decode(errors="ignore")
        if piece:
            taken.append(piece)
    return tuple(taken)
