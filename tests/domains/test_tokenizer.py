from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mfext.domains.tokenizer import ByteTokenizer, check_tokenizer, encode_documents, load_tokenizer
from mfext.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocabulary = {
        "<|endoftext|>": 0,
        "[UNK]": 1,
        "hello": 2,
        "world": 3,
        "<": 4,
        "|": 5,
        ">": 6,
        "endoftext": 7,
        "<pad>": 8,
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["<|endoftext|>", "<pad>"])
    tokenizer.enable_truncation(1)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_come_back_as_the_same_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(0 <= token < 256 for token in ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.pad_id]) == text


def test_the_byte_tokenizer_is_the_default_models_own() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (258, 256, 256, 257)
    check_tokenizer(tokenizer, 258, bos_id=256)


def test_documents_are_encoded_with_their_bytes_counted() -> None:
    assert encode_documents(("aä", "b"), ByteTokenizer()) == ([[97, 195, 164], [98]], [3, 1])


def test_a_tokenizer_file_adds_no_marks_cuts_nothing_and_reads_marks_in_text_as_text(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hello world world") == [2, 3, 3]
    assert tokenizer.bos_id not in tokenizer.encode("hello <|endoftext|>")
    assert tokenizer.decode([0, 2, 3]) == "hello world"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 0, 8, 9)


def test_a_folders_config_says_which_tokens_begin_end_and_pad(folder: Path) -> None:
    plain = load_tokenizer(str(folder))
    config = {"bos_token": {"content": "hello"}, "eos_token": "world", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 8)
    assert tokenizer.fingerprint != plain.fingerprint and len(tokenizer.fingerprint) == 64
    assert tokenizer.name == folder.name


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{", "not a tokenizer.json: .*bad JSON"),
        ("tokenizer.json", b"\xff", "not a tokenizer.json: .*bad JSON"),
        ("tokenizer.json", b'{"model": {}}', "not a tokenizer.json"),
        ("tokenizer_config.json", b"[]", "must hold one JSON object"),
        ("tokenizer_config.json", b'{"bos_token": "<nope>"}', "bos_token '<nope>' is not in the vocabulary"),
    ],
)
def test_a_damaged_tokenizer_is_refused(folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(folder))


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="names no token that begins a document"):
        load_tokenizer(str(tmp_path))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer 'byte'"):
        load_tokenizer("byte")
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="ids up to 257: the model's vocab_size is 100"):
        check_tokenizer(ByteTokenizer(), 100)
    with pytest.raises(InputError, match="begins documents with id 256: the model was trained with bos_id 0"):
        check_tokenizer(ByteTokenizer(), 300, bos_id=0)
    check_tokenizer(load_tokenizer(str(folder)), 50_432)
