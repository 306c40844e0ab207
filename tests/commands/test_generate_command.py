from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mfext.cli import main
from mfext.commands.generate import run
from mfext.commands.models import save_model
from mfext.config import ModelConfig
from mfext.errors import InputError
from mfext.hub.molm import published_config, published_tensors
from mfext.model.moduleformer import ModuleFormer
from mfext.requests import GenerateRequest, Invocation

SMALL = ModelConfig(d_model=16, num_layers=2, num_heads=2, d_attention=12, d_feedforward=10, d_router=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(ModuleFormer(SMALL), tmp_path / "model")
    return tmp_path / "model"


def quiet(request: GenerateRequest) -> list[dict[str, object]]:
    continuations = run(request, Invocation(quiet=True, device="cpu")).data["continuations"]
    assert isinstance(continuations, list)
    return continuations


def test_prompts_are_continued_together_as_alone(folder: Path) -> None:
    prompts = ("def main(", "", "größer")
    together = quiet(GenerateRequest(str(folder), prompts, max_new_tokens=8, temperature=0))
    assert [each["prompt"] for each in together] == list(prompts)
    for prompt, continuation in zip(prompts, together, strict=True):
        assert quiet(GenerateRequest(str(folder), (prompt,), max_new_tokens=8, temperature=0)) == [continuation]


def test_the_same_seed_writes_the_same_text(folder: Path) -> None:
    request = GenerateRequest(str(folder), ("a", "a"), max_new_tokens=10, top_k=50, top_p=0.9, seed=7)
    assert quiet(request) == quiet(request)


def test_json_is_one_object_with_the_stable_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", "--model", str(folder), "--prompt", "x", "--max-new-tokens", "5", "--json"])
    written = json.loads(capsys.readouterr().out)
    assert code == 0
    assert {"mfext_version", "seed", "config_hash", "model", "continuations", "tokens_per_s"} <= written.keys()
    (continuation,) = written["continuations"]
    assert continuation["prompt"] == "x"
    assert 1 <= len(continuation["tokens"]) <= 5
    assert continuation["finish"] in ("length", "eos")


def test_text_goes_to_stdout_with_its_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(folder), "--prompt", "hello\tthere", "--max-new-tokens", "3", "-q"]) == 0
    assert "hello   there" in capsys.readouterr().out


def test_a_published_folder_generates_once_its_tokenizer_fits(tmp_path: Path) -> None:
    model = ModuleFormer(SMALL)
    mapping = published_config(SMALL)
    (tmp_path / "config.json").write_text(json.dumps(mapping))
    save_file(published_tensors(model.state_dict(), SMALL), tmp_path / "model.safetensors")
    assert quiet(GenerateRequest(str(tmp_path), max_new_tokens=3))
    (tmp_path / "config.json").write_text(json.dumps({**mapping, "bos_token_id": 5}))
    with pytest.raises(InputError, match="begins documents with id 256"):
        quiet(GenerateRequest(str(tmp_path), max_new_tokens=3))


@pytest.mark.parametrize("words", [["--temperature", "nan"], ["--temperature", "inf"], ["--top-p", "nan"]])
def test_settings_that_are_no_numbers_are_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["generate", "--model", str(folder), *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
