"""Text to token ids and back: bytes by default, a tokenizer.json by option. The only door to tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mfext.errors import InputError

if TYPE_CHECKING:
    import tokenizers

KNOWN_MARKS = {
    "bos": ("<|endoftext|>", "<s>", "<|begin_of_text|>", "[BOS]", "<bos>", "[CLS]"),
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "[EOS]", "<eos>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|padding|>", "<|pad|>"),
}


class Tokenizer(Protocol):
    """What the rest of the project may ask of a tokenizer. `encode` adds no special tokens."""

    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides which ids a text becomes."""
        ...

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255; 256 begins (and so ends) a document, 257 pads."""

    name = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 256
    pad_id = 257
    fingerprint = hashlib.sha256(b"mfext-bytes-1").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bos and pad are left out, broken UTF-8 shows as U+FFFD."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json. Marks such as <s> inside a text are read as text, never as marks."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, name: str, marks: Mapping[str, int], fingerprint: str) -> None:
        self._tokenizer = tokenizer
        self.name = name
        self.vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        self.bos_id, self.eos_id, self.pad_id = marks["bos"], marks["eos"], marks["pad"]
        self.fingerprint = fingerprint

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(reference: str) -> Tokenizer:
    """The tokenizer named by "bytes", a tokenizer.json file, or a folder that holds one.

    A folder's tokenizer_config.json says which tokens begin, end and pad; without it the usual
    names are looked up. Raises InputError where the file is missing, damaged, or names no token
    that could begin a document.
    """
    if reference == "bytes":
        return ByteTokenizer()
    path = Path(reference)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        fix = "give 'bytes', a tokenizer.json file, or a folder holding one"
        raise InputError(f"no tokenizer '{reference}'", "", fix)
    content = _read(file)
    tokenizer = _parse(content, file)
    marks = _marks(tokenizer, file.with_name("tokenizer_config.json"), file)
    described = json.dumps(marks, sort_keys=True).encode()
    fingerprint = hashlib.sha256(hashlib.sha256(content).digest() + described).hexdigest()
    return FileTokenizer(tokenizer, file.resolve().parent.name, marks, fingerprint)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, bos_id: int | None = None) -> None:
    """Refuse a tokenizer whose ids a model of `vocab_size` (and `bos_id`, if given) cannot take."""
    top = max(tokenizer.vocab_size - 1, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    if top >= vocab_size:
        raise InputError(
            f"tokenizer '{tokenizer.name}' has ids up to {top}",
            f"the model's vocab_size is {vocab_size}",
            "use the tokenizer the model was trained with",
        )
    if bos_id is not None and tokenizer.bos_id != bos_id:
        raise InputError(
            f"tokenizer '{tokenizer.name}' begins documents with id {tokenizer.bos_id}",
            f"the model was trained with bos_id {bos_id}",
            "use the tokenizer the model was trained with",
        )


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
    """Token ids (no bos) and UTF-8 bytes of every document, as an evaluation takes them."""
    texts = list(documents)
    return [tokenizer.encode(text) for text in texts], [len(text.encode()) for text in texts]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError("cannot read the tokenizer", file, error.strerror or str(error)) from error


def _parse(content: bytes, file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise InputError("not a tokenizer.json", file, f"bad JSON: {error}") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except ValueError as error:
        raise InputError("not a tokenizer.json", file, str(error)) from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _marks(tokenizer: tokenizers.Tokenizer, config_file: Path, file: Path) -> dict[str, int]:
    named: Mapping[str, object] = {}
    if config_file.is_file():
        try:
            parsed = json.loads(_read(config_file).decode())
        except (ValueError, RecursionError) as error:
            raise InputError("not a tokenizer_config.json", config_file, f"bad JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise InputError("not a tokenizer_config.json", config_file, "it must hold one JSON object")
        named = parsed
    found = {kind: _mark(tokenizer, kind, named.get(f"{kind}_token"), config_file) for kind in KNOWN_MARKS}
    begins = found["bos"] if found["bos"] is not None else found["eos"]
    if begins is None:
        fix = "set bos_token or eos_token in tokenizer_config.json"
        raise InputError("the tokenizer names no token that begins a document", file, fix)
    ends = found["eos"] if found["eos"] is not None else begins
    return {"bos": begins, "eos": ends, "pad": found["pad"] if found["pad"] is not None else ends}


def _mark(tokenizer: tokenizers.Tokenizer, kind: str, given: object, config_file: Path) -> int | None:
    if isinstance(given, dict):
        given = given.get("content")
    if isinstance(given, str):
        token: int | None = tokenizer.token_to_id(given)
        if token is None:
            fix = "name a token of tokenizer.json"
            raise InputError(f"{kind}_token '{given}' is not in the vocabulary", config_file, fix)
        return token
    known = (tokenizer.token_to_id(mark) for mark in KNOWN_MARKS[kind])
    return next((token for token in known if token is not None), None)
