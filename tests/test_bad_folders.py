"""Malformed data and model folders through the commands: exit 2, one line, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mfext
from mfext.cli import main
from mfext.config import ModelConfig

TEXT = "".join(f"line {number} of a text that is long enough to be worth splitting\n" for number in range(60))


def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run one command line that must be refused; returns its last line on stderr."""
    code = main([*words, "-q"])
    out, err = capsys.readouterr()
    assert code == 2, f"{words}: exit {code}: {err}"
    assert out == ""
    assert err.startswith("mfext: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def jsonl(*texts: object) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def documents(start: int, count: int) -> str:
    return jsonl(*(f"document {number}: {TEXT[:200]}" for number in range(start, start + count)))


DATA: dict[str, dict[str, str | bytes]] = {
    "no files": {},
    "files of other kinds only": {"notes.csv": "a,b\n"},
    "no train": {"validation.jsonl": documents(0, 5), "test.jsonl": documents(5, 5)},
    "empty train": {"train.jsonl": ""},
    "a line that is not JSON": {"train.jsonl": documents(0, 3) + "{text: oops}\n"},
    "a line without text": {"train.jsonl": documents(0, 3) + '{"body": "x"}\n'},
    "text that is a number": {"train.jsonl": documents(0, 3) + jsonl(7)},
    "a list for a record": {"train.jsonl": documents(0, 3) + '["x"]\n'},
    "jsonl that is not UTF-8": {"train.jsonl": b'{"text": "\xff\xfe"}\n'},
    "txt that is not UTF-8": {"train.txt": b"caf\xe9\n" * 50},
    "parquet that is not": {"train.parquet": b"PAR1 not at all"},
    "two formats for one split": {"train.jsonl": documents(0, 40), "train.txt": TEXT},
    "evaluation text inside train": {
        "train.jsonl": documents(0, 40),
        "validation.jsonl": documents(10, 5),
        "test.jsonl": documents(50, 5),
    },
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused_in_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in DATA[case].items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refuse(["pretrain", "--domain", str(folder), "--dry-run", "model=tiny"], capsys)
    assert "mine" in error


def test_a_bad_record_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text(documents(0, 3) + "{oops}\n" + documents(3, 3))
    error = refuse(["pretrain", "--domain", str(tmp_path), "--dry-run", "model=tiny"], capsys)
    assert "train.jsonl" in error and "4" in error


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model folder of the tiny size."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, num_layers=1, num_heads=2, d_attention=16, d_feedforward=16, d_router=8)
    mfext.save(mfext.ModuleFormer(config), folder)
    return folder


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def flip_a_bit(folder: Path) -> None:
    path = weights_of(folder)
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(data)


def cut_short(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-100])


def forget(name: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(name)).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(name)).write_bytes(content)


def add_a_pickle(folder: Path) -> None:
    torch.save({"embedding.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    for name in ("*.safetensors", "MANIFEST.json"):
        forget(name)(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "one bit flipped": flip_a_bit,
    "weights cut short": cut_short,
    "weights missing": forget("*.safetensors"),
    "config missing": forget("config.json"),
    "manifest missing": forget("MANIFEST.json"),
    "config not JSON": write("config.json", b"{"),
    "config a list": write("config.json", b"[]"),
    "manifest not JSON": write("MANIFEST.json", b"\xff"),
    "manifest of something else": write("MANIFEST.json", b'{"kind": "cake"}'),
    "weights of text": write("*.safetensors", b"hello"),
    "only a pickle": add_a_pickle,
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("verb", ["inspect", "eval", "grow"])
def test_a_damaged_model_folder_is_refused_in_one_line(
    case: str, verb: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    MODELS[case](folder)
    words = {
        "inspect": ["inspect", "--model", str(folder)],
        "eval": ["eval", "--model", str(folder), "--domain", "unicode_names"],
        "grow": ["grow", "--base", str(folder), "--dry-run"],
    }
    error = refuse(words[verb], capsys)
    assert "model" in error


def published(folder: Path, shared_folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A copy of a golden checkpoint in the published layout with its tensors changed."""
    shutil.copytree(shared_folder / "golden" / "molm_mlp_gate", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def make_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(iter(tensors)))


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["surplus.weight"] = torch.zeros(2)


def reshape_one(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name][..., :-1].contiguous()


@pytest.mark.parametrize("change", [make_nan, drop_one, add_one, reshape_one])
def test_a_wrong_published_checkpoint_is_refused_in_one_line(
    change: Callable[[dict[str, torch.Tensor]], None],
    shared_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published(tmp_path / "molm", shared_folder, change)
    refuse(["inspect", "--model", str(tmp_path / "molm")], capsys)
