"""`mfext prune --drop-generation` as a user runs it: the model before that growth, to the bit, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mfext
from mfext.cli import main
from mfext.commands.continual import run as continual
from mfext.commands.dropping import sha256_before
from mfext.commands.models import model_tensors, open_model
from mfext.recipe import load_recipe
from mfext.report.report import Report
from mfext.store import model_hash
from tests.commands.tiny_world import QUIET, TINY, World

SHORT = (
    *TINY,
    "training.tokens=2048",
    "default_base.training.tokens=2048",
    "growth.gate.steps=20",
    "growth.gate.new_sequences=32",
    "growth.gate.probe_sequences=16",
    "evaluation.max_bytes=2048",
    "evaluation.bootstrap_samples=50",
)
FAST = ("-q", "--device", "cpu", "--threads", "1")
MEASURED = ("evaluation.max_bytes=2048", "evaluation.window=64", "evaluation.bootstrap_samples=50")
MEASURED_AND_TRAINED = (*MEASURED, "training.tokens=2048", "training.sequence_length=64", "training.batch_size=8")


@pytest.fixture(scope="module")
def grown_twice(world: World) -> Report:
    """Letters are the base; digits, then capitals are grown."""
    names = [str(world.letters), str(world.digits), str(world.capitals)]
    flags = {"domains": names, "bystanders": [], "out": str(world.runs / "grown-twice")}
    return continual(load_recipe("continual", None, [*SHORT, "method=grow"], flags), QUIET)


def stage(report: Report, name: str) -> Path:
    return next(path for path in (Path(str(report.data["run"])) / "stages").iterdir() if path.name.endswith(name))


def drop(grown: Report, names: str, domain: Path, out: Path, *more: str) -> list[str]:
    model = ["--model", str(grown.data["run"]), "--drop-generation", names, "--domain", str(domain)]
    return ["prune", *model, "--out", str(out), *FAST, *MEASURED_AND_TRAINED, *more]


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


def losses(data: dict[str, object], row: int) -> dict[str, float]:
    return dict(zip(data["domains"], data["matrix"]["nll_per_byte"][row], strict=True))


def test_the_newest_generation_leaves_the_model_before_it_and_comes_back(
    world: World, grown_twice: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "without"
    assert main([*drop(grown_twice, "capitals", world.capitals, out), "--json"]) == 0
    data = told(capsys)
    earlier = open_model(stage(grown_twice, "digits"))
    left = open_model(str(data["model"]))
    assert left.sha256 == earlier.sha256 == data["earlier_sha256"] and left.model.config == earlier.model.config
    assert data["equals_earlier"] and data["equals_masked"] and data["restores_exactly"]
    assert data["masked_difference"] == 0 and data["dropped"] == ["capitals"]
    # The same losses as that model has, and the new domain is worse off without its experts.
    before, after = losses(data, 0), losses(data, 1)
    row = losses(grown_twice.data, 2)
    assert {name: after[name] for name in ("letters", "digits")} == {name: row[name] for name in ("letters", "digits")}
    assert after["capitals"] > before["capitals"]
    (whole, point) = data["curve"]
    assert point["dropped"] == ["capitals"] and point["params"] == data["params_after"] < whole["params"]
    assert point["nll_per_byte"] == pytest.approx(after)
    # What the folder says it knows: no longer capitals, and how it came about.
    assert [each["name"] for each in left.metadata["domains"]] == ["letters", "digits"]
    entry = left.metadata["lineage"][-1]
    assert entry["dropped"] == ["capitals"] and entry["method"] == "prune" and entry["sha256"] == left.sha256
    assert main(["restore", str(out), "--out", str(tmp_path / "whole"), "--json"]) == 0
    assert told(capsys)["equals_unpruned"] is True
    whole_again, full = open_model(tmp_path / "whole"), open_model(str(grown_twice.data["model"]))
    assert whole_again.sha256 == full.sha256 and whole_again.model.config == full.model.config
    assert whole_again.metadata["domains"] == full.metadata["domains"]
    assert whole_again.metadata["lineage"] == full.metadata["lineage"]
    assert main(["report", str(out)]) == 0
    page = capsys.readouterr().out
    assert "without generation capitals" in page and "Bit for bit the model that capitals was grown on" in page
    assert "Knee" not in page


def test_all_generations_leave_the_base_newest_first(
    world: World, grown_twice: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*drop(grown_twice, "digits,capitals", world.letters, tmp_path / "base"), "--json"]) == 0
    data = told(capsys)
    base = open_model(stage(grown_twice, "letters"))
    assert open_model(str(data["model"])).sha256 == base.sha256 and data["equals_earlier"]
    assert [point.get("dropped") for point in data["curve"]] == [None, ["capitals"], ["capitals", "digits"]]


def test_a_generation_in_the_middle_leaves_with_its_price_measured(
    world: World, grown_twice: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*drop(grown_twice, "digits", world.digits, tmp_path / "middle"), "--json"]) == 0
    data = told(capsys)
    assert data["equals_earlier"] is None and data["equals_masked"] and data["restores_exactly"]
    full, left = mfext.load(str(grown_twice.data["model"])), mfext.load(str(data["model"]))
    old, new = model_tensors(full), model_tensors(left)
    moved = {name.replace("generations.0.", "generations.1."): value for name, value in new.items()}
    assert {name: value for name, value in old.items() if name in moved}.keys() == moved.keys()
    assert all(old[name].equal(value) for name, value in moved.items())
    assert [each.name for each in left.config.generations] == ["capitals"]
    assert losses(data, 1)["digits"] > losses(data, 0)["digits"]
    assert main(["restore", str(tmp_path / "middle"), "--out", str(tmp_path / "whole"), "-q"]) == 0
    assert model_hash(model_tensors(mfext.load(tmp_path / "whole"))) == model_hash(old)
    assert main(["report", str(tmp_path / "middle")]) == 0
    assert "No earlier model to be equal to" in capsys.readouterr().out
    page = (tmp_path / "middle" / "report.html").read_text(encoding="utf-8")
    assert "Gate of capitals" in page and "Gate of digits" not in page, "the generation left is called by its name"


def test_a_dry_run_says_what_would_be_free_and_writes_nothing(
    world: World, grown_twice: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*drop(grown_twice, "capitals", world.capitals, tmp_path / "dry"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would remove" in said and "nothing was written" in said and "capitals, whole" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        ("captals", (), "no generation 'captals': model: it has digits, capitals; did you mean 'capitals'?"),
        ("base", (), "no generation 'base'"),
        ("capitals", ("--keep", "0.25"), "without keep"),
        ("capitals", ("--max-loss-increase", "0.1"), "without keep"),
    ],
)
def test_what_cannot_leave_is_said_in_one_line(
    world: World,
    grown_twice: Report,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: str,
    more: tuple[str, ...],
    said: str,
) -> None:
    assert main(drop(grown_twice, names, world.capitals, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not (tmp_path / "run").exists()


def test_a_model_that_never_grew_has_nothing_to_drop(
    world: World, grown_twice: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(stage(grown_twice, "letters"))
    words = ["prune", "--model", model, "--drop-generation", "code", "--domain", str(world.letters), *FAST]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "it has none beyond its base" in capsys.readouterr().err


def test_only_a_lineage_of_growths_leads_to_an_earlier_model() -> None:
    base = {"method": "pretrain", "name": "base", "sha256": "0"}
    code, prose = ({"method": "grow", "name": name, "sha256": name} for name in ("code", "prose"))
    tuned = {"method": "full", "name": "code", "sha256": "t"}
    assert sha256_before([base, code, prose], ["prose"]) == "code"
    assert sha256_before([base, code, prose], ["prose", "code"]) == "0"
    assert sha256_before([base, code, prose, tuned], ["prose"]) is None
    assert sha256_before([code], ["code"]) is None and sha256_before([], ["code"]) is None
