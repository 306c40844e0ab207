"""Whole stories on a tiny model: grow, report, grow again, take off, evaluate, inspect, write, save and load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mfext
from mfext.cli import main
from mfext.commands import evaluate, grow, inspect, pretrain, report
from mfext.commands.models import open_model
from mfext.config import GateTraining, GrowthConfig, TrainingConfig
from mfext.domains.packing import pack
from mfext.domains.sources import load_domain
from mfext.domains.stream import TokenStream
from mfext.domains.tokenizer import ByteTokenizer
from mfext.errors import InputError
from mfext.model.moduleformer import ModuleFormer
from mfext.paths import cache_folder
from mfext.recipe import recipe_to_mapping
from mfext.report.report import Report
from mfext.requests import EvalRequest, InspectRequest, Invocation, ReportRequest
from mfext.store import Run
from mfext.training.module import ContinualModuleFormer
from tests.commands.tiny_world import QUIET, World

# cli.md's contract for grow; every verb's own keys come on top.
GROW_KEYS = {
    *("run", "model", "method", "domains", "stages", "matrix", "forgetting", "learned", "params", "frozen_ok"),
    *("identity_at_growth", "tokens", "wall_s", "tokens_per_s", "mfext_version", "seed", "config_hash"),
}
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def grown_twice(world: World, grown: Report) -> Report:
    """Capitals learned on top of the first run."""
    return grow.run(world.recipe("second", f"base={grown.data['run']}", domain=world.capitals), QUIET)


def part(report: Report, *keys: str) -> Mapping[str, object]:
    """An object inside a report's data."""
    here: object = report.data
    for key in keys:
        assert isinstance(here, Mapping)
        here = here[key]
    assert isinstance(here, Mapping)
    return here


def rows(report: Report) -> list[list[float]]:
    matrix = part(report, "matrix")["nll_per_byte"]
    assert isinstance(matrix, list)
    return matrix


def folder_of(report: Report, key: str = "run") -> Path:
    return Path(str(report.data[key]))


def logits_of(model: ModuleFormer) -> Tensor:
    ids = torch.arange(96).remainder(258).view(2, 48)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_growing_learns_forgets_next_to_nothing_and_keeps_its_promises(grown: Report) -> None:
    assert grown.data.keys() >= GROW_KEYS
    assert grown.data["domains"] == ["letters", "digits"]
    assert grown.data["finished"] and not grown.alarms
    assert grown.data["frozen_ok"] is True
    assert grown.data["identity_at_growth"] == 0
    assert grown.data["detach_equals_base"] is True
    before, after = (part(grown, "learned", "digits")[key] for key in ("before", "after"))
    assert isinstance(before, float) and isinstance(after, float) and after < 0.7 * before
    mean = part(grown, "forgetting", "mean")
    assert isinstance(mean["difference"], float) and mean["difference"] < 0.02
    assert {"difference", "low", "high"} <= part(grown, "forgetting", "domains", "letters").keys()
    assert {"total", "trainable", "active_per_token", "added"} == part(grown, "params").keys()


def test_a_run_folder_holds_its_reports_and_its_raw_measurements(grown: Report) -> None:
    folder = folder_of(grown)
    for name in ("report.html", "report.md", "metrics.json", "ledger.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "metrics.json").read_text())["matrix"] == grown.data["matrix"]
    ledger = Run.open(folder, read_only=True).read_ledger()
    assert {(row["stage"], row["domain"]) for row in ledger} == {
        (stage, domain) for stage in (0, 1) for domain in ("letters", "digits")
    }


def test_a_second_grow_reuses_the_base_and_repeats_the_first_to_the_bit(
    world: World, grown: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    again = grow.run(world.recipe("again"), Invocation(device="cpu", threads=1))
    assert "base: reusing" in capsys.readouterr().err
    assert rows(again) == rows(grown)
    assert open_model(folder_of(again)).sha256 == open_model(folder_of(grown)).sha256


@pytest.mark.parametrize(("override", "frozen"), [("growth=compete", True), ("method=full", None)])
def test_other_ways_to_learn_run_too(world: World, grown: Report, override: str, frozen: bool | None) -> None:
    other = grow.run(world.recipe(override.replace("=", "-"), override), QUIET)
    assert other.data["frozen_ok"] is frozen
    assert rows(other)[0] == rows(grown)[0]
    assert rows(other)[1][1] < rows(other)[0][1]


def test_two_growths_in_a_row_and_taking_off_the_second_gives_the_first_back(
    grown: Report, grown_twice: Report
) -> None:
    assert grown_twice.data["domains"] == ["letters", "digits", "capitals"]
    assert grown_twice.data["frozen_ok"] is True and grown_twice.data["identity_at_growth"] == 0
    assert rows(grown_twice)[0][:2] == rows(grown)[1]
    first, second = mfext.load(folder_of(grown)), mfext.load(folder_of(grown_twice))
    module = ContinualModuleFormer(second)
    module.detach()
    assert same_bits(second.state_dict(), first.state_dict())
    assert second.config == first.config
    assert torch.equal(logits_of(module.model.eval()), logits_of(first))


def test_a_domain_the_base_knows_is_refused(world: World, grown: Report) -> None:
    with pytest.raises(InputError, match="already knows 'digits'"):
        grow.run(world.recipe("refused", f"base={grown.data['run']}"), QUIET)
    assert not (world.runs / "refused").exists()


def test_saving_and_loading_reproduce_the_logits_in_a_fresh_process(grown: Report, tmp_path: Path) -> None:
    model = mfext.load(folder_of(grown))
    mfext.save(model, tmp_path / "saved")
    code = (
        "import sys, torch, mfext; torch.set_num_threads(1); model = mfext.load(sys.argv[1]);"
        "from safetensors.torch import save_file; ids = torch.arange(96).remainder(258).view(2, 48);"
        "save_file({'logits': model(ids).logits}, sys.argv[2])"
    )
    path = tmp_path / "logits.safetensors"
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "saved"), str(path)], check=True, env=environment)
    assert torch.equal(load_file(path)["logits"], logits_of(model))


@pytest.mark.parametrize("name", ["molm_shared_kv_identity", "molm_switch_loss"])
def test_a_published_checkpoint_loads_and_can_be_inspected(name: str) -> None:
    vectors = load_file(GOLDEN / name / "golden.safetensors")
    model = mfext.load(GOLDEN / name, dtype=torch.float64)
    with torch.no_grad():
        logits = model(vectors["input_ids"]).logits
    torch.testing.assert_close(logits, vectors["logits"].double(), rtol=1e-6, atol=1e-6)
    data = inspect.run(InspectRequest(str(GOLDEN / name)), QUIET).data
    assert data["source"] == "published MoLM layout"
    assert data["generations"] == [] and data["lineage"] == []


@pytest.mark.filterwarnings("ignore:::lightning")  # its advice on loaders and workers
def test_a_plain_lightning_script_trains_grows_and_takes_off(world: World, tmp_path: Path) -> None:
    documents = load_domain(str(world.digits), known={}).train
    packed = pack(documents, ByteTokenizer(), tmp_path)
    stream = TokenStream([packed], sequence_length=32, batch_size=4, seed=1, stage=0)
    loader = torch.utils.data.DataLoader(stream.dataset(0, 4, 1, 0, 1), batch_size=None)
    config = mfext.ModelConfig(d_model=16, num_layers=1, num_heads=2, d_attention=16, d_feedforward=16, d_router=8)
    module = ContinualModuleFormer(ModuleFormer(config), TrainingConfig(learning_rate=1e-2))

    def fit() -> None:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(max_steps=4, accelerator="cpu", logger=False, **quiet)
        trainer.fit(module, loader)

    fit()
    before, loss = {name: value.clone() for name, value in module.model.state_dict().items()}, logits_of(module.model)
    text = torch.cat([stream.batch(step)["input_ids"] for step in range(8)])
    growth = GrowthConfig(gate=GateTraining(probe_sequences=16, probe_length=32, steps=30))
    module.grow(growth, "digits", text)
    fit()
    module.teach_gate(growth, text)
    after = module.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(bool(after[name].any()) for name in after.keys() - before.keys())
    module.detach()
    assert same_bits(module.model.state_dict(), before)
    assert torch.equal(logits_of(module.model), loss)


def test_eval_measures_what_the_run_measured(world: World, grown: Report, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--model", str(grown.data["run"]), "--domain", f"{world.letters},{world.digits}", "--json"]
    assert main([*words, "-q", "--device", "cpu", "evaluation.window=64"]) == 0
    data = json.loads(capsys.readouterr().out)
    for column, name in enumerate(("letters", "digits")):
        entry = data["domains"][name]
        assert {"nll_nats", "tokens", "bytes", "documents", "bits_per_byte", "perplexity"} <= entry.keys()
        assert entry["nll_nats"] / entry["bytes"] == rows(grown)[1][column]
    assert data["usage"].keys() == {"letters", "digits"}
    assert data["generations"][0]["name"] == "digits"
    gates = [data["domains"][name]["gates"][0]["share_open"] for name in ("letters", "digits")]
    assert gates[0] < 0.1 and gates[1] > 0.6


def test_inspect_accounts_for_every_parameter(
    grown_twice: Report, capsys: pytest.CaptureFixture[str], world: World
) -> None:
    data = inspect.run(InspectRequest(str(grown_twice.data["run"])), QUIET).data
    model = mfext.load(folder_of(grown_twice))
    params = data["params"]
    assert isinstance(params, dict)
    owners = {each["name"]: each for each in params["by_generation"]}
    assert list(owners) == ["base", "digits", "capitals"]
    assert sum(each["total"] for each in owners.values()) == params["total"]
    assert params["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert [site["experts"] for site in data["sites"][:2]] == [[3, 4, 4], [4, 4, 4]]
    assert [each["name"] for each in data["domains"]] == ["letters", "digits", "capitals"]
    assert [each["method"] for each in data["lineage"]] == ["pretrain", "grow", "grow"]
    assert main(["inspect", "--model", str(grown_twice.data["run"])]) == 0
    assert "2 generations beyond its base" in capsys.readouterr().out


def test_a_grown_model_writes_text(grown: Report, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(grown.data["run"]), "--prompt", "12 + 3", "--max-new-tokens", "12"]
    assert main([*words, "--temperature", "0", "--json", "-q"]) == 0
    (continuation,) = json.loads(capsys.readouterr().out)["continuations"]
    assert continuation["prompt"] == "12 + 3" and continuation["tokens"]


def test_a_report_is_rebuilt_from_the_ledger_as_it_was(grown: Report) -> None:
    folder = folder_of(grown)
    names = ("report.html", "report.md", "metrics.json")
    before = [(folder / name).read_text() for name in names]
    for name in names:
        (folder / name).unlink()
    rebuilt = report.run(ReportRequest(str(folder)), QUIET)
    assert rebuilt.data == grown.data
    assert [(folder / name).read_text() for name in names] == before


def test_pretraining_reports_too_and_no_other_verb_continues_it(world: World) -> None:
    recipe = world.recipe("pretrained")
    made = pretrain.run(recipe, QUIET)
    assert made.data["method"] == "pretrain" and made.data["finished"]
    assert report.run(ReportRequest(str(made.data["run"])), QUIET).data == made.data
    with pytest.raises(InputError, match="another verb began this run"):
        grow.run(recipe, Invocation(quiet=True, resume=str(made.data["run"])))
    with pytest.raises(InputError, match="this run exists"):
        grow.run(recipe, QUIET)


def test_a_run_without_a_measured_stage_has_no_report(world: World, tmp_path: Path) -> None:
    Run.create(tmp_path / "young", recipe_to_mapping(world.recipe("x")), {"verb": "grow"}).close()
    with pytest.raises(InputError, match="no stage of this run is measured yet"):
        report.run(ReportRequest(str(tmp_path / "young")), QUIET)


def test_a_dry_run_writes_nothing(world: World, grown: Report, capsys: pytest.CaptureFixture[str]) -> None:
    folders = (world.runs.parent, cache_folder())
    before = [sorted(folder.rglob("*")) for folder in folders]
    for base in ([], ["--base", str(grown.data["run"])]):
        words = world.words("planned")
        words[2] = str(world.capitals)
        assert main([*words, *base, "--dry-run", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["dry_run"] is True
        assert {"total", "trainable", "frozen", "added", "active_per_token"} == data["params"].keys()
        names = [each["operation"] for each in data["plan"]["operations"]]
        assert names == ["FreezeExperts", "AddExperts"]
    assert [sorted(folder.rglob("*")) for folder in folders] == before


def test_a_model_without_recorded_domains_can_be_measured_and_grown(
    world: World, grown: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mfext.save(mfext.load(folder_of(grown) / "stages" / "000-base"), tmp_path / "plain")
    request = EvalRequest(str(tmp_path / "plain"), (str(world.letters),))
    assert evaluate.run(request, QUIET).data["model_sha256"] == open_model(tmp_path / "plain").sha256
    made = grow.run(world.recipe("foreign", f"base={tmp_path / 'plain'}"), QUIET)
    assert "names no domains" in capsys.readouterr().err
    assert made.data["domains"] == ["digits"] and made.data["frozen_ok"] is True
