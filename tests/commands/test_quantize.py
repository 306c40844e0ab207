"""`mfext quantize` as a user runs it: how small, at what loss, and what the smaller folder is good for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfext.cli import main
from mfext.commands.models import model_tensors, open_model, save_model
from mfext.growth.apply import apply_plan
from mfext.growth.growable import growable
from mfext.growth.plan import plan_detach
from mfext.store import read_manifest, tensor_hashes
from tests.commands.tiny_world import TINY, World
from tests.growth.tiny_growth import force_gate, grow, tiny_model, wake

CARRIED = Path(__file__).parents[1] / "golden"
SMALL = ("--device", "cpu", "--threads", "1", "-q", "evaluation.window=64", "evaluation.max_bytes=3000")
FORMATS = ("int8", "bf16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a generation that speaks on every token, and a story."""
    made = tiny_model()
    grow(made, "code")
    wake(made, 1)
    force_gate(made, 1, 50.0)
    folder = tmp_path_factory.mktemp("models") / "grown"
    lineage = [{"stage": 0, "name": "base", "method": "pretrain", "domains": ["letters"]}]
    save_model(made, folder, {"tokenizer": "bytes", "lineage": lineage})
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def quantized(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("quantized") / str(request.param)
    assert main(["quantize", "--model", str(model), "--to", str(request.param), "--out", str(folder), *SMALL]) == 0
    return folder


@pytest.mark.parametrize("weights", FORMATS)
def test_what_it_costs_is_measured_before_and_after_and_kept_beside_the_weights(
    weights: str, world: World, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = f"{world.letters},{world.digits}"
    words = ["quantize", "--model", str(model), "--to", weights, "--domain", domains, "--out", str(tmp_path / "q")]
    assert main([*words, "--json", *SMALL]) == 0
    data = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "q" / "metrics.json").read_text())
    assert kept["domains"] == data["domains"] and kept["model_sha256"] == data["model_sha256"]
    opened = open_model(tmp_path / "q")
    assert (opened.sha256, opened.weights, data["weights"]) == (data["model_sha256"], weights, weights)
    assert data["from_sha256"] == open_model(model).sha256 != data["model_sha256"]
    assert data["after"]["disk_bytes"] < data["before"]["disk_bytes"]
    measured = {}
    for which, folder in (("before", model), ("after", tmp_path / "q")):
        assert main(["eval", "--model", str(folder), "--domain", domains, "--json", *SMALL]) == 0
        measured[which] = json.loads(capsys.readouterr().out)["domains"]
    for name, entry in data["domains"].items():
        for which in ("before", "after"):
            row = measured[which][name]
            assert entry[which] == row["nll_nats"] / row["bytes"], "eval of either folder says the same"
        assert entry["difference"] == pytest.approx(entry["after"] - entry["before"], abs=1e-12)
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert measured["before"][name]["gates"] == measured["after"][name]["gates"], "gates open where they did"
    rows = json.loads((tmp_path / "q" / "ledger.json").read_text())["rows"]
    assert [(row["stage"], row["domain"]) for row in rows] == [
        (0, "letters"),
        (0, "digits"),
        (1, "letters"),
        (1, "digits"),
    ]


def test_every_opening_gives_the_same_bits_and_the_story_goes_on(quantized: Path, model: Path) -> None:
    first, again, before = open_model(quantized), open_model(quantized), open_model(model)
    assert tensor_hashes(model_tensors(first.model)) == tensor_hashes(model_tensors(again.model))
    assert first.model.config == before.model.config
    assert all(tensor.dtype == torch.float32 for tensor in model_tensors(first.model).values())
    lineage = first.metadata["lineage"]
    assert isinstance(lineage, list)
    assert [entry["name"] for entry in lineage] == ["base", quantized.name]
    assert lineage[-1]["sha256"] == first.sha256 and lineage[-1]["from_sha256"] == before.sha256
    assert read_manifest(quantized).parent == read_manifest(model).identity


def test_taking_a_generation_off_before_or_after_gives_the_same_bits(
    quantized: Path, model: Path, tmp_path: Path
) -> None:
    alone = growable(open_model(model).model)
    apply_plan(alone, plan_detach(alone.config))
    save_model(alone, tmp_path / "alone")
    words = ["--model", str(tmp_path / "alone"), "--to", quantized.name, "--out", str(tmp_path / "small")]
    assert main(["quantize", *words, *SMALL]) == 0
    detached = growable(open_model(quantized).model)
    apply_plan(detached, plan_detach(detached.config))
    expected = model_tensors(open_model(tmp_path / "small").model)
    assert tensor_hashes(model_tensors(detached)) == tensor_hashes(expected)


def test_it_generates_and_is_inspected(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(quantized), "--prompt", "12", "--max-new-tokens", "4", "-q"]) == 0
    capsys.readouterr()
    assert main(["inspect", "--model", str(quantized)]) == 0
    assert quantized.name in next(line for line in capsys.readouterr().out.splitlines() if "stored as" in line)
    assert main(["inspect", "--model", str(quantized), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["weights"], data["dtype"]) == (quantized.name, "float32")


def test_growing_on_it_freezes_the_widened_weights_and_what_grew_can_be_stored_small_again(
    world: World, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, run = tmp_path / "small", tmp_path / "run"
    assert main(["quantize", "--model", str(model), "--to", "int8", "--out", str(small), *SMALL]) == 0
    capsys.readouterr()
    settings = (*TINY, "training.tokens=2048", "growth.gate.steps=5", f"old_domains=['{world.letters}']")
    short = ("evaluation.max_bytes=2000", "evaluation.bootstrap_samples=20", "growth.gate.probe_sequences=8")
    words = ["grow", "--base", str(small), "--domain", str(world.digits), "--out", str(run), "--json", "-q"]
    assert main([*words, *settings, *short]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["frozen_ok"] and data["detach_equals_base"]
    base = next((run / "stages").glob("000-*"))
    assert open_model(base).sha256 == open_model(small).sha256 and open_model(base).weights is None
    assert "weights" not in json.loads((base / "config.json").read_text())
    assert main(["quantize", "--model", str(run), "--to", "int8", "--out", str(tmp_path / "again"), *SMALL]) == 0
    assert (
        main(["prune", "--model", str(small), "--domain", str(world.digits), "--keep", "0.75", "--dry-run", "-q"]) == 0
    )


@pytest.mark.parametrize(("weights", "allowed"), [("int8", 0.04), ("bf16", 0.01)])
@pytest.mark.parametrize("name", ["molm_shared_kv_identity", "molm_switch_loss"])
def test_a_published_checkpoint_stays_close_to_its_golden_logits(
    name: str, weights: str, allowed: float, tmp_path: Path
) -> None:
    """Rounding noise of a matrix relative to its weights: 2.5 / 127 / sqrt(12) = 0.6 % in int8, 0.1 % in bf16, over
    some ten matrices in a row 1.8 % and 0.4 %; a factor of two to spare. The median: in untrained checkpoints
    experts are near-equal, and a position where a router then takes another one is far off."""
    source = CARRIED / name
    words = ["--model", str(source), "--to", weights, "--out", str(tmp_path / "q")]
    assert main(["quantize", *words, *SMALL]) == 0
    opened, golden = open_model(tmp_path / "q"), load_file(source / "golden.safetensors")
    with torch.no_grad():
        logits_BTV = opened.model(golden["input_ids"]).logits.double()
    error_BT = (logits_BTV - golden["logits"]).square().mean(-1).sqrt() / golden["logits"].std()
    assert 0 < error_BT.median() < allowed
    assert opened.metadata["source"] == "published MoLM layout"


def test_a_tokenizer_beside_the_weights_stays_beside_them(tmp_path: Path) -> None:
    shutil.copytree(CARRIED / "molm_switch_loss", tmp_path / "molm")
    (tmp_path / "molm" / "tokenizer.json").write_text('{"version": "1.0"}')
    words = ["--model", str(tmp_path / "molm"), "--to", "bf16", "--out", str(tmp_path / "q")]
    assert main(["quantize", *words, *SMALL]) == 0
    assert (tmp_path / "q" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_a_terminal_shows_sizes_and_losses(
    world: World, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", "--model", str(model), "--to", "bf16", "--out", str(tmp_path / "q")]
    assert main([*words, "--domain", str(world.digits), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "95 % interval" in out and "of before" in out and "digits" in out
    assert main([*words, *SMALL]) == 0, "a model it wrote is replaced safely"
    assert "not measured" in capsys.readouterr().out
    assert not (tmp_path / "q" / "ledger.json").exists()


def test_a_dry_run_says_how_small_it_would_be_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "--model", str(model), "--to", "int8", "--dry-run", "--json", *SMALL]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["dry_run"] and 0 < data["after"]["weights_bytes"] < data["before"]["weights_bytes"]
    assert list(tmp_path.iterdir()) == []


def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["quantize", *words, "-q"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("mfext: error: ") and error.count("\n") == 1
    return error


def test_what_is_quantized_already_is_refused(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for weights in FORMATS:
        words = ["--model", str(quantized), "--to", weights, "--out", str(tmp_path / "q")]
        assert f"already stored as {quantized.name}" in refuse(words, capsys)
    assert not (tmp_path / "q").exists()


def test_a_folder_it_may_not_write_is_refused_before_anything_is_measured(
    world: World, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--to", "bf16", "--domain", str(world.digits), "--out"]
    assert "the model itself" in refuse([*words, str(tmp_path / "model")], capsys)
    assert "not a folder mfext may replace" in refuse([*words, str(world.digits)], capsys)
    assert open_model(tmp_path / "model").weights is None
    assert sorted(path.name for path in world.digits.iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]


def test_without_torchao_int8_ends_with_one_line_and_bf16_works(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--model", str(model), "--out", str(tmp_path / "q"), "--to"]
    assert "pip install 'mfext[quantize]'" in refuse([*words, "int8"], capsys)
    assert not (tmp_path / "q").exists()
    assert main(["quantize", *words, "bf16", *SMALL]) == 0
