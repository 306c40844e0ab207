"""`mfext eval --switch`, and every gate against its budget: from the command line to JSON and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import mfext
from mfext.cli import main
from mfext.commands.gate_budgets import gate_budgets
from mfext.domains.passages import cut_passages
from mfext.report.gate_budgets import budget_line
from mfext.report.report import Report
from tests.commands.tiny_world import World
from tests.growth.tiny_growth import grow, tiny_model

SMALL = ("switch.bytes=40", "switch.documents=3", "switch.short_bytes=[4,16]", "evaluation.window=64", "-q")


def words(model: object, world: World, *more: str) -> list[str]:
    domains = f"{world.letters},{world.digits}"
    return ["eval", "--model", str(model), "--domain", domains, "--device", "cpu", "--threads", "1", *SMALL[3:], *more]


@pytest.fixture(scope="module")
def grown_run(grown: Report) -> Path:
    return Path(str(grown.data["run"]))


def as_json(capsys: pytest.CaptureFixture[str], words: list[str]) -> Any:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def texts(folder: Path, *sizes: int) -> tuple[tuple[str, ...], ...]:
    lines = (folder / "validation.jsonl").read_text().splitlines()
    return cut_passages([json.loads(line)["text"] for line in lines], sizes, 3)


def bits_of_tail(model: Any, read: str, scored: str) -> float:
    """Bits to predict `scored` after `read`, in one context."""
    ids = torch.tensor([[model.config.bos_id, *(read + scored).encode()]])
    with torch.inference_mode():
        logits = model(ids[:, :-1]).logits[0]
    losses = F.cross_entropy(logits.double(), ids[0, 1:], reduction="none")
    return float(losses[len(read.encode()) :].sum()) / torch.log(torch.tensor(2.0)).item()


def test_the_losses_are_those_of_one_context_and_of_the_same_bytes_alone(
    world: World, grown_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = as_json(capsys, words(grown_run, world, "--switch", *SMALL))
    pair = data["switch"]["pairs"][0]
    assert (pair["outer"], pair["inner"], pair["documents"]) == ("letters", "digits", 3)
    model = mfext.load(grown_run)
    outer, inner = texts(world.letters, 40, 40), texts(world.digits, 40, 40)
    shown = {region["region"]: region for region in pair["regions"]}
    num_bytes = 3 * 40
    expected = {
        ("inside", "bits_per_byte"): sum(
            bits_of_tail(model, a, c) for (a, _), (c, _) in zip(outer, inner, strict=True)
        ),
        ("inside", "alone_bits_per_byte"): sum(bits_of_tail(model, "", c) for c, _ in inner),
        ("after", "bits_per_byte"): sum(
            bits_of_tail(model, a + c, b) for (a, b), (c, _) in zip(outer, inner, strict=True)
        ),
        ("after", "uninterrupted_bits_per_byte"): sum(bits_of_tail(model, a, b) for a, b in outer),
        ("after", "alone_bits_per_byte"): sum(bits_of_tail(model, "", b) for _, b in outer),
    }
    for (region, key), bits in expected.items():
        assert shown[region][key] == pytest.approx(bits / num_bytes, rel=1e-5), (region, key)
    assert shown["before"]["bits_per_byte"] == pytest.approx(shown["before"]["alone_bits_per_byte"], rel=1e-5)
    cut = data["short"]["domains"]["letters"][1]
    bits = sum(bits_of_tail(model, "", text) for (text,) in texts(world.letters, 16))
    assert cut["cut_bytes"] == 16 and cut["bits_per_byte"] == pytest.approx(bits / (3 * 16), rel=1e-5)


def test_gates_are_named_and_their_lags_and_failures_count_every_document(
    world: World, grown_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = as_json(capsys, words(grown_run, world, "--switch", *SMALL))
    for pair in data["switch"]["pairs"]:
        for region in pair["regions"]:
            (gate,) = region["gates"]
            assert gate["generation"] == "digits" and 0 <= gate["mean_openness"] <= 1
            for verb in ("opens", "closes"):
                assert (gate[f"{verb}_after_tokens_mean"] is None) == (gate[f"never_{verb}"] == pair["documents"])
    there = data["switch"]["pairs"][1]["regions"][0]["gates"][0]["mean_openness"]
    here = data["switch"]["pairs"][0]["regions"][0]["gates"][0]["mean_openness"]
    assert there > 0.5 > here, "open in a document of digits, closed in one of letters"


def test_the_tables_say_it_in_words(world: World, grown_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(grown_run, world, "--switch", *SMALL)) == 0
    shown = capsys.readouterr().out
    for title in (
        "Documents that switch domain and back",
        "Gates where the domain switches",
        "Very short documents",
        "Gates against their budget",
    ):
        assert title in shown
    assert "40 B a region, 3 documents a pair" in " ".join(shown.split()).replace("\u202f", " ")


def test_a_model_without_gates_shows_losses_and_no_gate(
    world: World, grown_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = next((grown_run / "stages").glob("000-*"))
    assert main(words(base, world, "--switch", *SMALL)) == 0
    shown = capsys.readouterr().out
    assert "switch domain and back" in shown and "Very short documents" in shown
    assert "gate of" not in shown and "Gates" not in shown
    data = as_json(capsys, words(base, world, "--switch", *SMALL))
    assert data["gates"] == [] and data["switch"]["pairs"][0]["regions"][0]["gates"] == []


def test_without_the_flag_nothing_of_it_is_measured(
    world: World, grown_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"switch", "short"}.isdisjoint(as_json(capsys, words(grown_run, world)))


def test_a_gate_is_held_to_its_budget_on_what_was_measured(
    world: World, grown_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = f"{world.letters},{world.digits},{world.capitals}"
    data = as_json(capsys, ["eval", "--model", str(grown_run), "--domain", domains, "--device", "cpu", *SMALL[3:]])
    (gate,) = data["gates"]
    assert (gate["generation"], gate["domains"], gate["max_false_open"]) == ("digits", ["digits"], 0.01)
    assert {name: on["role"] for name, on in gate["on"].items()} == {
        "letters": "earlier",
        "digits": "own",
        "capitals": "never",
    }
    for name, on in gate["on"].items():
        (measured,) = data["domains"][name]["gates"]
        assert (on["share_open"], on["share_not_full"]) == (measured["share_open"], measured["share_not_full"])
        assert on["within_budget"] is (None if name == "digits" else on["share_open"] <= 0.01)


def test_budgets_follow_the_lineage_and_a_broken_one_is_named() -> None:
    model = tiny_model()
    grow(model, "code")
    grow(model, "code-2")
    shares = {"share_open": 0.02, "share_not_full": 0.9}
    measured = {name: {"gates": [{"gate": 0, **shares}, {"gate": 1, **shares}]} for name in ("prose", "code", "maths")}
    lineage = [
        {"name": "base", "domains": ["prose"]},
        {"name": "code", "domains": ["code"], "gate": {"max_false_open": 0.03, "false_open": 0.03, "false_close": 0.1}},
        {"name": "code-2", "domains": ["maths"], "gate": {"max_false_open": 0.01}},
    ]
    first, second = gate_budgets(model.config, {"lineage": lineage}, measured)
    assert on_each(first, "role") == ["earlier", "own", "later"]
    assert on_each(second, "role") == ["earlier", "earlier", "own"]
    assert on_each(first, "within_budget") == [True, None, True]
    assert on_each(second, "within_budget") == [False, False, None]
    line = budget_line({"gates": [first, second]})
    assert "2 of 3" in line and "code-2 on prose, code-2 on code" in line
    assert budget_line({"gates": [first]}).startswith("every gate keeps")
    unknown, _ = gate_budgets(model.config, {}, measured)
    assert unknown["max_false_open"] is None and budget_line({"gates": [unknown]}) == ""
    assert on_each(unknown, "within_budget") == [None, None, None]


def on_each(gate: Any, key: str) -> list[object]:
    return [on[key] for on in gate["on"].values()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["switch.bytes=64"], "needs --switch"),
        (["--switch", "switch.bytes=3"], "at least 4"),
        (["--switch", "switch.short_bytes=[32,16]"], "rising"),
        (["--switch", "switch.bytes=50000"], "less than 100000 bytes of validation text"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    world: World, grown_run: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(words(grown_run, world, *more)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_one_domain_cannot_be_switched(world: World, grown_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", str(grown_run), "--domain", str(world.letters), "--switch", "-q"]) == 2
    assert "at least two" in capsys.readouterr().err
