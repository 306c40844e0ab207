from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from mfext.domains.domain import num_bytes
from mfext.domains.embedded import EmbeddedSettings
from mfext.domains.sources import load_domain
from mfext.errors import InputError, MachineError

KNOWN = {name: EmbeddedSettings(name, 1000, 100) for name in ("code", "prose")}


def write_lines(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n" for text in documents), encoding="utf-8")


def load(folder: Path):
    return load_domain(str(folder), known=KNOWN)


def test_three_jsonl_files_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "my.domain-1"
    for split, documents in (("train", ["a\r\n", " b\u2028 "]), ("validation", ["c"]), ("test", ["d\n\n"])):
        write_lines(folder / f"{split}.jsonl", documents)
    domain = load(folder)
    assert (domain.name, domain.train, domain.validation, domain.test) == (
        "my.domain-1",
        ("a\r\n", " b\u2028 "),
        ("c",),
        ("d\n\n",),
    )
    assert domain.notes == () and domain.provenance["split_rule"] == "as given"


def test_a_folder_with_only_train_is_split_the_same_way_every_time_and_says_so(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "train.jsonl", [f"document {number}" for number in range(100)])
    domain = load(tmp_path / "d")
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (90, 5, 5)
    assert domain == load(tmp_path / "d")
    assert domain.notes[0].startswith("no validation and no test given") and "train 90" in domain.notes[0]


def test_only_the_missing_split_is_taken_out_of_train(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "train.jsonl", [f"document {number}" for number in range(40)])
    write_lines(tmp_path / "d" / "validation.jsonl", ["held out"])
    domain = load(tmp_path / "d")
    assert (len(domain.train), domain.validation, len(domain.test)) == (38, ("held out",), 2)


def test_repeated_train_documents_are_kept_and_reported(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "train.jsonl", ["same", "other", "same "])
    write_lines(tmp_path / "d" / "validation.jsonl", ["v"])
    write_lines(tmp_path / "d" / "test.jsonl", ["t"])
    domain = load(tmp_path / "d")
    assert len(domain.train) == 3
    assert domain.notes == ("train: 1 of 3 documents repeat an earlier one; all are kept",)


def test_a_validation_document_that_is_also_in_train_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "d" / "train.jsonl", ["one", "two"])
    write_lines(tmp_path / "d" / "validation.jsonl", ["two"])
    write_lines(tmp_path / "d" / "test.jsonl", ["three"])
    with pytest.raises(InputError, match="d/validation and d/train, first: 'two'"):
        load(tmp_path / "d")


def test_a_text_file_is_cut_at_blank_lines_without_losing_a_byte(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * 100 for number in range(60)) + "\n"
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "validation.txt").write_text("v\n")
    (tmp_path / "test.txt").write_text("t\n")
    domain = load(tmp_path)
    assert "".join(domain.train) == text
    assert all(num_bytes([document]) <= 4096 for document in domain.train) and len(domain.train) > 5


def test_a_folder_of_text_files_holds_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(4):
        (tmp_path / "train" / f"{number}.txt").write_text(f"first {number}\n\n\nsecond")
    domain = load(tmp_path)
    everything = domain.train + domain.validation + domain.test
    assert sorted(everything) == [f"first {number}\n\n\nsecond" for number in range(4)]


def test_a_parquet_file_is_read_by_its_text_column(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(30)]
    datasets.Dataset.from_dict({"text": texts, "more": texts}).to_parquet(str(tmp_path / "train.parquet"))
    domain = load(tmp_path)
    assert sorted(domain.train + domain.validation + domain.test) == sorted(texts)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("words", ["a"], "no text column: .*found words"),
        ("text", ["a", None], "row 2: text is missing"),
        ("text", [1, 2], "row 1: text is not a string but int"),
    ],
)
def test_a_bad_parquet_record_is_named(tmp_path: Path, column: str, values: list[object], message: str) -> None:
    datasets.Dataset.from_dict({column: values}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_a_file_that_only_claims_to_be_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 this is not one")
    with pytest.raises(InputError, match="not a readable parquet file"):
        load(tmp_path)


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"text": "bad\n', "line 2: bad JSON"),
        (GOOD + b"[1]\n", "line 2: one JSON object"),
        (GOOD + b'{"txt": "a"}\n', 'line 2: no "text" field; found txt'),
        (GOOD + b'{"text": 3}\n', "line 2: text is not a string but int"),
        (GOOD + b'{"text": null}\n', "line 2: text is missing"),
        (GOOD + b'{"text": " \\n"}\n', "line 2: text is empty"),
        (GOOD + GOOD + b'{"text": "\xff"}\n', "line 3: invalid UTF-8"),
        (GOOD + b'{"text": "\\ud800"}\n', "line 2: text is not valid Unicode"),
        (GOOD + b"\n" + GOOD, "line 2: the line is empty"),
        (b"[" * 100_000 + b"\n", "line 1: bad JSON"),
        (b"\xef\xbb\xbf" + GOOD, "line 1: bad JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "line 1: bad JSON"),
        (b"", "no documents"),
    ],
)
def test_the_first_bad_line_is_refused_with_file_line_and_reason(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert "train.jsonl" in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_invalid_utf8_in_a_text_file_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"one\ntwo\n\xe4\n")
    with pytest.raises(InputError, match="line 3: invalid UTF-8"):
        load(tmp_path)


def test_a_folder_without_train_with_two_trains_or_mixed_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no files in the domain's folder"):
        load(tmp_path)
    write_lines(tmp_path / "validation.jsonl", ["a"])
    with pytest.raises(InputError, match=r"no train.jsonl"):
        load(tmp_path)
    write_lines(tmp_path / "train.jsonl", ["b", "c"])
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match=r"train is given twice: .* found train.jsonl and train"):
        load(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train" / "a.txt").write_text("a")
    (tmp_path / "train" / "b.csv").write_text("a")
    with pytest.raises(InputError, match=r"found \.csv, \.txt"):
        load(tmp_path)


def test_a_folder_whose_name_no_domain_may_have_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "my domain" / "train.jsonl", ["a", "b", "c"])
    with pytest.raises(InputError, match="cannot have this name"):
        load(tmp_path / "my domain")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no domain 'cod': known: code, prose; .*Did you mean 'code'\?"):
        load_domain("cod", known=KNOWN)
    with pytest.raises(InputError, match=r"no domain 'zzzz'") as caught:
        load_domain("zzzz", known=KNOWN)
    assert "Did you mean" not in str(caught.value)


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_domain("./nothing/here", known=KNOWN)
    write_lines(tmp_path / "train.jsonl", ["a"])
    with pytest.raises(InputError, match="a folder, not a file"):
        load_domain(str(tmp_path / "train.jsonl"), known=KNOWN)


def test_a_file_that_vanishes_while_reading_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "train.jsonl", ["a"])

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(MachineError, match=r"train.jsonl: Permission denied"):
        load(tmp_path)


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def load_dataset(*arguments: object) -> object:
        calls.append(arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_data_set_is_loaded_with_its_config_and_missing_splits_are_carved(monkeypatch) -> None:
    part = datasets.Dataset.from_dict({"text": [f"row {number}" for number in range(50)]})
    held = datasets.Dataset.from_dict({"text": ["held"]})
    calls = fake_hub(monkeypatch, datasets.DatasetDict({"train": part, "dev": held}))
    domain = load_domain("hf:owner/some.name:tiny", known=KNOWN)
    assert calls == [("owner/some.name", "tiny")]
    assert domain.name == "some.name-tiny" and domain.validation == ("held",)
    assert len(domain.train) == 48 and len(domain.test) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ConnectionError("offline"), "the Hub cannot be reached: hf:owner/name: offline; go online"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "no such data set on the Hub"),
        (ValueError("Config name is missing.\nPick one of: a, b"), "cannot be loaded: hf:owner/name: Config name is"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}), "no train split.*found test"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"words": ["a"]})}), "no text column.*found words"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a", ""]})}), "row 2: text is empty"),
    ],
)
def test_a_hub_failure_is_one_clear_line(monkeypatch, answer: object, message: str) -> None:
    fake_hub(monkeypatch, answer)
    with pytest.raises(InputError, match=message) as caught:
        load_domain("hf:owner/name", known=KNOWN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b:", "hf:../x y"])
def test_a_malformed_hub_reference_is_refused_without_asking(monkeypatch, reference: str) -> None:
    calls = fake_hub(monkeypatch, AssertionError())
    with pytest.raises(InputError, match="not a Hugging Face data set"):
        load_domain(reference, known=KNOWN)
    assert not calls


def test_the_development_corpora_load(shared_folder: Path) -> None:
    domain = load_domain(str(shared_folder / "corpora" / "german_prose"), known=KNOWN)
    assert (len(domain.train), len(domain.validation), len(domain.test)) == (1009, 86, 95)
    assert num_bytes(domain.train) == 2_849_671
