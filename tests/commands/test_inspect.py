"""`mfext inspect --domain`: what experts do, measured once and kept, shown in a terminal, as JSON and as a page."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mfext.commands.usage as usage_module
from mfext.cli import main
from mfext.commands import inspect
from mfext.commands.models import OpenedModel, open_model, save_model
from mfext.commands.setting import load_domains
from mfext.commands.usage import usage_of
from mfext.config import GrowthMode, ModelConfig
from mfext.config_evaluation import EvaluationConfig
from mfext.domains.tokenizer import load_tokenizer
from mfext.errors import InputError
from mfext.metrics.usage import Usage, scores
from mfext.model.dense import DenseTransformer
from mfext.model.observing import observing
from mfext.report.terminal import Console
from mfext.requests import InspectRequest
from tests.commands.tiny_world import QUIET, World
from tests.growth.tiny_growth import MODES, force_gate, grow, tiny_model, wake

SMALL = EvaluationConfig(window=64, max_bytes=900)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFEXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "usage"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model with a generation open on every token."""
    model = tiny_model()
    grow(model, "code")
    wake(model, 1)
    force_gate(model, 1, 50.0)
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The domains that a model was run on."""
    measured: list[str] = []
    real = usage_module._measure

    def measure(opened: OpenedModel, column: usage_module.Column, settings: EvaluationConfig) -> Usage:
        measured.append(column.domain)
        return real(opened, column, settings)

    monkeypatch.setattr(usage_module, "_measure", measure)
    return measured


def usages(folder: Path, world: World, settings: EvaluationConfig = SMALL) -> dict[str, Usage]:
    domains = load_domains([str(world.letters), str(world.digits)], Console.silent())
    return usage_of(open_model(folder), domains, settings, Console.silent())


def test_a_second_call_reads_what_the_first_measured_and_runs_no_model(
    saved: Path, world: World, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = usages(saved, world)
    assert runs == ["letters", "digits"] and first["letters"] != first["digits"]
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *words, **named: pytest.fail("a model was run"))
    assert usages(saved, world) == first
    assert len(runs) == 2


def test_other_text_another_window_or_another_model_is_measured_anew(
    saved: Path, world: World, runs: list[str]
) -> None:
    first = usages(saved, world)
    for settings in (replace(SMALL, window=32), replace(SMALL, max_bytes=400), replace(SMALL, split="test")):
        usages(saved, world, settings)
    assert len(runs) == 8
    model = open_model(saved).model
    model.config = replace(model.config, feedforward_experts_per_token=3)
    save_model(model, saved)
    assert usages(saved, world)["letters"] != first["letters"] and len(runs) == 10


def test_a_damaged_file_is_measured_and_written_anew(
    saved: Path, world: World, runs: list[str], own_cache: Path
) -> None:
    first = usages(saved, world)
    for number, path in enumerate(sorted(own_cache.iterdir())):
        path.write_bytes(path.read_bytes().replace(b"share", b"shape", 1) if number else b"")
    assert usages(saved, world) == first and usages(saved, world) == first
    assert len(runs) == 4


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_result(
    saved: Path, world: World, own_cache: Path
) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text("a file where a folder should be")
    stream = io.StringIO()
    domains = load_domains([str(world.letters)], Console.silent())
    found = usage_of(open_model(saved), domains, SMALL, Console(stream, quiet=True))
    assert found["letters"].tokens and "not kept" in stream.getvalue()


@pytest.mark.parametrize("mode", [None, "gated", "side", "compete", "preserve"])
def test_usage_is_that_of_a_plain_forward_over_each_document(
    mode: GrowthMode | None, tmp_path: Path, world: World
) -> None:
    model = tiny_model()
    if mode is not None:
        grow(model, "code", MODES[mode])
        wake(model, 1)
    save_model(model, tmp_path / "m")
    documents = load_domains([str(world.digits)], Console.silent())[0].validation[:2]
    total = sum(len(document.encode()) for document in documents)
    settings = EvaluationConfig(window=512, max_bytes=total)
    (domain,) = load_domains([str(world.digits)], Console.silent())
    found = usage_of(open_model(tmp_path / "m"), [domain], settings, Console.silent())["digits"]
    sums: dict[tuple[int, str, int], torch.Tensor] = {}
    tokenizer = load_tokenizer("bytes")
    for document in documents:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(document)][:-1]])
        with torch.inference_mode(), observing(model):
            for routing in model(ids).routings:
                key = (routing.site.layer, routing.site.kind, routing.generation)
                norms_MK = routing.output_norms_MK
                assert norms_MK is not None
                sum_E = sums.setdefault(key, torch.zeros(routing.num_experts + 1, dtype=torch.float64))
                worth_R = (routing.gates_MK * norms_MK).double().flatten()
                sums[key] = sum_E.index_add(0, routing.experts_MK.flatten(), worth_R)
    assert found.tokens == total
    by_bank = {bank.key: bank for bank in found.banks}
    for key, contribution in scores(found, "contribution").items():
        expected_E = (sums[key][:-1] / max(1, by_bank[key].tokens)).tolist()
        assert contribution == pytest.approx(expected_E, rel=1e-4)


def test_a_dense_model_is_refused_because_it_has_no_experts(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(
        architecture="dense",
        d_model=32,
        num_layers=1,
        num_heads=2,
        d_attention=32,
        attention_experts=1,
        feedforward_experts=1,
        attention_experts_per_token=1,
        feedforward_experts_per_token=1,
        routing_loss_weight=0.0,
    )
    save_model(DenseTransformer(config), tmp_path / "dense")
    assert main(["inspect", "--model", str(tmp_path / "dense"), "--domain", str(world.letters), "-q"]) == 2
    assert "a dense model has no experts" in capsys.readouterr().err
    assert main(["inspect", "--model", str(tmp_path / "dense"), "-q"]) == 0


def test_the_command_prints_maps_json_and_a_page(
    saved: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", "--model", str(saved), "--domain", f"{world.letters},{world.digits}", "-q"]
    words += ["--max-bytes", "900", "--split", "test", "--device", "cpu", "--threads", "1"]
    page = tmp_path / "experts.html"
    assert main([*words, "--out", str(page)]) == 0
    shown = capsys.readouterr().out
    for part in ("letters · attention", "digits · feed-forward", "Balance", "entropy", "Overlap of domains", "code"):
        assert part in shown
    assert "letters · attention" in page.read_text() and "Contribution" in page.read_text()
    assert main([*words, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["split"] == "test" and data["usage"].keys() == {"letters", "digits"}
    assert data["config"]["num_layers"] == 2 and data["generations"] and {"lineage", "size_bytes"} <= data.keys()
    bank = data["usage"]["digits"]["banks"][0]
    assert len(bank["contribution"]) == len(bank["share"]) == 3 and bank["contribution"][0] > 0
    matrix = data["overlap"]["cosine"]
    assert matrix[0][1] == matrix[1][0] and matrix[0][0] == pytest.approx(1.0)


def test_without_domains_nothing_is_measured_or_written(saved: Path, own_cache: Path) -> None:
    report = inspect.run(InspectRequest(str(saved)), QUIET)
    assert "usage" not in report.data and "overlap" not in report.data and not own_cache.exists()
    assert "Experts per site" in {section.title for section in report.sections if section.in_terminal}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "page.txt"], "must end in .html"),
        (["--domain", "cod"], "no domain"),
        (["--split", "train", "--domain", "code"], "evaluation.split"),
    ],
)
def test_what_cannot_be_is_one_line(
    saved: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "--model", str(saved), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, world: World) -> None:
    save_model(tiny_model(), tmp_path / "m", {"tokenizer": "bytes"})
    domains = load_domains([str(world.letters)], Console.silent())
    with pytest.raises(InputError, match="trained with 'bytes'"):
        usage_of(open_model(tmp_path / "m"), domains, SMALL, Console.silent(), tokenizer=str(tmp_path))
