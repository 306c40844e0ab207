"""`mfext prune` and `mfext restore` as a user runs them: the curve, the smaller model, and the way back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import mfext
from mfext.cli import main
from mfext.commands.grow import run as grow_run
from mfext.commands.models import model_tensors, open_model
from mfext.commands.prune import run as prune
from mfext.commands.setting import load_domains
from mfext.commands.sweep_summary import with_groups
from mfext.commands.usage import usage_of
from mfext.config import Recipe
from mfext.config_evaluation import EvaluationConfig
from mfext.errors import InputError
from mfext.growth.banks import num_experts
from mfext.metrics.usage import scores
from mfext.model.moduleformer import ModuleFormer
from mfext.recipe import load_recipe, recipe_of_run
from mfext.report.comparison import sweep_report
from mfext.report.quantities import percent
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import Invocation
from mfext.store import model_hash
from tests.commands.tiny_world import QUIET, TINY, World

SHORT = (
    *TINY,
    "training.tokens=4096",
    "default_base.training.tokens=4096",
    "evaluation.max_bytes=2048",
    "evaluation.bootstrap_samples=50",
    "pruning.sample_bytes=2048",
    "pruning.ablation_windows=4",
)


def recipe_of(world: World, out: Path, *more: str, **flags: object) -> Recipe:
    base = f"default_base.domains=['{world.letters}','{world.digits}']"
    given = {"domain": str(world.digits), "out": str(out), **flags}
    return load_recipe("prune", None, [*SHORT, base, *more], given)


@pytest.fixture(scope="module")
def pruned(world: World) -> Report:
    """The default base pruned by contribution, healed for a few steps, with a curve of two criteria."""
    recipe = recipe_of(
        world,
        world.runs / "pruned",
        "pruning.curve=[0.75,0.1]",
        "pruning.curve_criteria=[contribution,random]",
        "pruning.keep=0.75",
        "pruning.heal_tokens=1024",
    )
    return prune(recipe, QUIET)


def stage_of(report: Report, name: str) -> Path:
    return next(path for path in (Path(str(report.data["run"])) / "stages").iterdir() if path.name.endswith(name))


def test_a_pruning_tells_what_was_kept_what_it_cost_and_that_it_is_proven(pruned: Report) -> None:
    data = pruned.data
    assert data["finished"] and data["equals_masked"] and data["restores_exactly"]
    assert [stage["name"] for stage in data["stages"]] == ["base", "pruned", "healed"]
    assert data["kept"] + data["removed"] == data["experts"]
    before, after = open_model(stage_of(pruned, "base")), open_model(stage_of(pruned, "pruned"))
    assert data["params_before"] == sum(each.numel() for each in before.model.parameters())
    assert data["params_after"] == sum(each.numel() for each in after.model.parameters()) < data["params_before"]
    assert data["after"]["disk_bytes"] < data["before"]["disk_bytes"]
    assert all(data["after"][f"{speed}_tokens_per_s"] > 0 for speed in ("read", "decode", "decode_16"))
    curve = data["curve"]
    assert isinstance(curve, list)
    assert [(point["criterion"], point["keep"]) for point in curve] == [
        (None, 1.0), ("contribution", 0.75), ("contribution", 0.1), ("random", 0.75), ("random", 0.1),
    ]  # fmt: skip
    assert all("reason" in point for point in curve if point["keep"] == 0.1), "below what a token chooses"
    for point in curve[1::2]:
        assert point["params"] < curve[0]["params"]
        rise = point["increase"]["digits"]
        assert rise["difference"] == pytest.approx(point["nll_per_byte"]["digits"] - curve[0]["nll_per_byte"]["digits"])
        assert rise["low"] <= rise["difference"] <= rise["high"]
    assert any("same bits" in line for line in pruned.verdict)
    assert data["learned"] == {} and "digits" in data["forgetting"]["domains"], "healing is no lesson"


def test_a_real_pruning_fills_the_page_of_a_sweep(pruned: Report) -> None:
    trial = {"id": "a", "state": "done", "run": "trials/a", "error": None, "overrides": {"domain": "x/digits"}}
    report = sweep_report(with_groups({"verb": "prune", "axes": {}, "trials": [{**trial, "data": pruned.data}]}))
    kept = percent(pruned.data["kept"] / pruned.data["experts"])
    assert report.verdict[0].startswith(f"on digits frozen keeps {kept} of the experts, loss ")
    assert "drawn by lot" in report.verdict[1]
    titles = [section.title for section in report.sections]
    assert titles[:3] == ["Key numbers", "Share kept against loss", "What pruning cost"]


def test_the_removed_experts_go_back_bit_for_bit(
    world: World, pruned: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(pruned.data["run"])
    assert main(["restore", run, "--out", str(tmp_path / "whole"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equals_unpruned"] is True
    whole, base = mfext.load(tmp_path / "whole"), open_model(stage_of(pruned, "base"))
    assert model_hash(model_tensors(whole)) == base.sha256 and whole.config == base.model.config
    healed = ["--model", str(stage_of(pruned, "healed"))]
    assert main(["restore", run, *healed, "--out", str(tmp_path / "odd")]) == 2
    assert "trained since" in capsys.readouterr().err
    assert main(["restore", str(world.letters), "--out", str(tmp_path / "odd")]) == 2
    assert not (tmp_path / "odd").exists()


def test_a_pruned_model_is_evaluated_inspected_and_generates(
    world: World, pruned: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(stage_of(pruned, "pruned"))
    assert main(["generate", "--model", model, "--prompt", "12", "--max-new-tokens", "5", "-q"]) == 0
    assert main(["inspect", "--model", model]) == 0
    assert "pruned" in capsys.readouterr().out
    words = ["eval", "--model", model, "--domain", str(world.digits), "--json", "-q", "--device", "cpu"]
    assert main([*words, "evaluation.window=64", "evaluation.max_bytes=2048"]) == 0
    loss = json.loads(capsys.readouterr().out)["domains"]["digits"]
    row = pruned.data["matrix"]["nll_per_byte"][1]
    at = list(pruned.data["domains"]).index("digits")
    assert loss["nll_nats"] / loss["bytes"] == pytest.approx(row[at])


def test_a_pruning_goes_on_where_it_stopped_and_its_report_is_rebuilt(
    world: World, pruned: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(str(pruned.data["run"]))
    before = {name: (run / name).read_bytes() for name in ("curve.json", "ledger.jsonl", "footprint.json")}
    again = prune(recipe_of_run(run, {}), Invocation(quiet=True, device="cpu", threads=1, resume=str(run)))
    assert again.data["curve"] == pruned.data["curve"]
    assert {name: (run / name).read_bytes() for name in before} == before
    assert main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["curve"] == pruned.data["curve"]


def test_fine_tuning_comes_first_and_a_bound_finds_the_fewest_experts(world: World) -> None:
    recipe = recipe_of(
        world,
        world.runs / "bounded",
        "method=concentrate",
        "pruning.curve=[]",
        "pruning.max_loss_increase=0.5",
        "pruning=usage",
    )
    data = prune(recipe, QUIET).data
    assert [stage["name"] for stage in data["stages"]] == ["base", "digits", "pruned"]
    tuned, smaller = (row[list(data["domains"]).index("digits")] for row in data["matrix"]["nll_per_byte"][1:])
    assert smaller <= tuned * 1.5
    assert data["criterion"] == "usage"


@pytest.fixture(scope="module")
def grown_first(world: World, request: pytest.FixtureRequest) -> Report:
    """Letters are the base, digits are grown."""
    words = [*SHORT, f"growth={request.param}", f"default_base.domains=['{world.letters}']"]
    flags = {"domain": str(world.digits), "out": str(world.runs / f"grown-first-{request.param}")}
    return grow_run(load_recipe("grow", None, words, flags), QUIET)


@pytest.mark.parametrize("grown_first", ["gated", "compete"], indirect=True)
def test_a_grown_model_keeps_the_old_and_new_experts_that_the_new_domain_uses(
    world: World, grown_first: Report, tmp_path: Path
) -> None:
    more = ("pruning.curve=[0.75]", "pruning.curve_criteria=[contribution,random]", "pruning.keep=0.75")
    more = (*more, "pruning.budget=per_layer")
    recipe = recipe_of(world, tmp_path / "pruned", *more, base=str(grown_first.data["run"]))
    data = prune(recipe, QUIET).data
    cuts = data["cuts"]
    assert isinstance(cuts, list) and {cut["generation"] for cut in cuts} == {0, 1}, "old and new experts leave"
    assert data["equals_masked"] and data["restores_exactly"] and data["finished"]
    assert all(len(cut["kept"]) == math.ceil(0.75 * cut["of"]) for cut in cuts)
    whole, smaller = open_model(str(grown_first.data["model"])), open_model(str(data["model"]))
    assert isinstance(smaller.model, ModuleFormer) and isinstance(whole.model, ModuleFormer)
    # By use: among the experts of a bank that leaves some, none that stays is worth less than one that left.
    domains = load_domains([str(world.digits)], Console.silent())
    usage = usage_of(whole, domains, used(recipe), Console.silent(), None, "train")
    worth = scores(usage["digits"], "contribution")
    for cut in cuts:
        first = 0
        own = worth.get((cut["layer"], cut["kind"], cut["generation"]))
        if own is None:  # numbered through in the base's softmax
            first = num_experts(whole.model.config, (cut["layer"], cut["kind"], 0))
            own = worth[cut["layer"], cut["kind"], 0]
        bank = own[first : first + cut["of"]]
        left = [bank[expert] for expert in range(cut["of"]) if expert not in cut["kept"]]
        assert min(bank[expert] for expert in cut["kept"]) >= max(left)
    assert [each.name for each in smaller.model.config.generations] == ["digits"]
    assert [point["criterion"] for point in data["curve"] if "digits" in point["increase"]] == [
        "contribution",
        "random",
    ]


def used(recipe: Recipe) -> EvaluationConfig:
    """The train text that experts are chosen on."""
    return replace(recipe.evaluation, max_bytes=recipe.pruning.sample_bytes)


@pytest.mark.parametrize("grown_first", ["gated"], indirect=True)
def test_a_grown_model_is_pruned_of_its_new_experts_alone(world: World, grown_first: Report, tmp_path: Path) -> None:
    grown = grown_first
    recipe = recipe_of(
        world,
        tmp_path / "pruned",
        "pruning.curve=[]",
        "pruning.generations=[digits]",
        "pruning.keep=0.75",
        base=str(grown.data["run"]),
    )
    data = prune(recipe, QUIET).data
    cuts = data["cuts"]
    assert isinstance(cuts, list) and cuts and all(cut["generation"] == 1 for cut in cuts)
    smaller = open_model(str(data["model"])).model
    assert isinstance(smaller, ModuleFormer) and len(smaller.generations) == 1
    whole = open_model(str(grown.data["model"])).model
    assert isinstance(whole, ModuleFormer)
    assert smaller.config.experts("attention", 0) == whole.config.experts("attention", 0)


def test_what_would_be_removed_is_said_without_writing(world: World, tmp_path: Path) -> None:
    recipe = recipe_of(world, tmp_path / "dry", "pruning.keep=0.75", "method=full")
    report = prune(recipe, Invocation(quiet=True, device="cpu", threads=1, dry_run=True))
    params = report.data["params"]
    assert isinstance(params, dict) and params["removed"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["pruning.keep=0"], "above 0"),
        (["pruning.keep=0.01"], "least possible"),
        (["pruning.generations=[nobody]"], "no generation"),
        (["pruning.curve=[1.5]"], "between 0 and 1"),
        (["pruning.curve_criteria=[luck]"], "luck"),
        (["model=dense_demo_active"], "dense"),
    ],
)
def test_what_cannot_be_pruned_is_said_in_one_line(world: World, tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        dry = Invocation(quiet=True, device="cpu", threads=1, dry_run=True)
        prune(recipe_of(world, tmp_path / "bad", *more), dry)


def test_an_unknown_domain_and_a_missing_model_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--domain", "nowhere"], ["--domain", "code", "--model", str(tmp_path / "none")]):
        assert main(["prune", *words, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("mfext: error:")
    assert not (tmp_path / "run").exists()
