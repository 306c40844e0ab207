"""Tokens prepared once: an indexed, memory-mapped, checked file per split and tokenizer.

Layout, little-endian: a header of 4096 bytes (magic, JSON, zeros), the tokens of all documents
one after another, each document preceded by its bos, zeros up to a multiple of 8, then D + 1
uint64 positions: where each document's bos stands, and the end. The header names the SHA-256 of
everything after it, which is checked on every opening (1.25 GiB/s).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mfext.domains.cache_file import publish
from mfext.domains.domain import split_hash
from mfext.domains.tokenizer import Tokenizer
from mfext.errors import InputError

MAGIC = b"mfextpk1"
HEADER_BYTES = 4096
CHUNK_BYTES = 1 << 22
Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class PackedDocuments:
    """The tokens of a split: `tokens` (P,) with a bos before every document, `offsets` (D + 1,) int64.

    Pickles as its path, so that worker processes map the same file.
    """

    path: Path
    tokens: Tokens
    offsets: NDArray[np.int64]
    bos_id: int
    content_sha256: str

    @property
    def num_documents(self) -> int:
        """D, the documents in the file."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """P, tokens of all documents with their bos."""
        return len(self.tokens)

    def document(self, index: int) -> list[int]:
        """The token ids of one document, without its bos."""
        ids: list[int] = self.tokens[self.offsets[index] + 1 : self.offsets[index + 1]].tolist()
        return ids

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return open_packed, (self.path,)


def pack(documents: Sequence[str], tokenizer: Tokenizer, cache_folder: Path) -> PackedDocuments:
    """Tokenize documents into a file of `cache_folder`, or open the one that is already there.

    The file is named by content and tokenizer; a damaged one is written anew. Raises InputError
    for no documents, MachineError where the folder cannot be written.
    """
    if not documents:
        raise InputError("no documents to pack", cache_folder, "the split is empty")
    content = split_hash(documents)
    key = hashlib.sha256(f"{MAGIC.decode()}:{content}:{tokenizer.fingerprint}".encode()).hexdigest()
    path = cache_folder / f"{key[:32]}.tokens"
    packed = _open(path)
    if packed is None or packed.content_sha256 != content:
        publish(path, lambda file: _write(file, documents, tokenizer, content))
        packed = open_packed(path)
    return packed


def open_packed(path: Path) -> PackedDocuments:
    """Map a packed file. Raises InputError where it is missing or not what its header says."""
    packed = _open(path)
    if packed is None:
        raise InputError("not a packed token file, or a damaged one", path, "delete it; it is made anew")
    return packed


def _write(file: BinaryIO, documents: Sequence[str], tokenizer: Tokenizer, content: str) -> None:
    dtype = np.min_scalar_type(max(tokenizer.vocab_size - 1, tokenizer.bos_id)).newbyteorder("<")
    digest = hashlib.sha256()

    def put(block: bytes) -> None:
        digest.update(block)
        file.write(block)

    file.write(bytes(HEADER_BYTES))
    offsets = [0]
    for document in documents:
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(document)], dtype=dtype)
        put(ids.tobytes())
        offsets.append(offsets[-1] + len(ids))
    put(bytes(-offsets[-1] * dtype.itemsize % 8))
    put(np.array(offsets, dtype="<u8").tobytes())
    header = {
        "dtype": dtype.str,
        "tokens": offsets[-1],
        "documents": len(documents),
        "bos_id": tokenizer.bos_id,
        "tokenizer": tokenizer.fingerprint,
        "content_sha256": content,
        "payload_sha256": digest.hexdigest(),
    }
    file.seek(0)
    file.write(MAGIC + json.dumps(header).encode())


def _open(path: Path) -> PackedDocuments | None:
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            digest = hashlib.sha256()
            while block := file.read(CHUNK_BYTES):
                digest.update(block)
        if not head.startswith(MAGIC):
            return None
        header = json.loads(head[len(MAGIC) :].rstrip(b"\0"))
        if header["payload_sha256"] != digest.hexdigest():
            return None
        dtype, count, documents = np.dtype(header["dtype"]), int(header["tokens"]), int(header["documents"])
        tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (count,))
        start = HEADER_BYTES + -(-count * dtype.itemsize // 8) * 8
        offsets = np.fromfile(path, "<u8", documents + 1, offset=start).astype(np.int64)
        return PackedDocuments(path, tokens, offsets, int(header["bos_id"]), str(header["content_sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
