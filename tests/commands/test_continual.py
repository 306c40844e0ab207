"""`mfext continual` on two-kilobyte domains: every method, exact resume, repeated domains, what each run proves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import get_args

import pytest

from mfext.commands.continual import run
from mfext.commands.models import model_tensors, open_model
from mfext.config import MethodName, Recipe
from mfext.errors import InputError
from mfext.growth.apply import apply_plan
from mfext.growth.growable import growable
from mfext.growth.plan import plan_detach
from mfext.recipe import load_recipe, recipe_to_mapping
from mfext.store import Run, Stage, is_run_folder, tensor_hashes
from tests.commands.child_process import finish, fork_server, kill_when, start
from tests.commands.tiny_world import QUIET, TINY, World, make_world

STEPS = 8
SMALL = ("training.tokens=4096", "training.batch_size=8", "ewc.windows=8", "lora.rank=4", "method=grow")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield fork_server()


def stream(world: World, out: str, *overrides: str, domains: tuple[Path, ...] = ()) -> Recipe:
    named = [str(each) for each in domains or (world.letters, world.digits, world.capitals)]
    words = [*TINY, *SMALL, *overrides]
    return load_recipe("continual", None, words, {"domains": named, "bystanders": [], "out": str(world.runs / out)})


@pytest.mark.parametrize("method", [name for name in get_args(MethodName) if name != "grow"])
def test_every_method_learns_a_stream_and_reports_it(world: World, method: str) -> None:
    report = run(stream(world, method, f"method={method}"), QUIET)
    rows = report.data["matrix"]["nll_per_byte"]
    assert report.data["finished"] is True
    assert len(rows) == (3 if method == "joint" else 4)
    assert all(value is not None for row in rows for value in row)
    before, after = rows[1], rows[-1]
    learned = after[0] if method == "joint" else after[2]
    assert learned < before[2] if method != "frozen" else rows[1] == rows[2] == rows[3]
    promised = {"frozen": True, "expand": True}.get(method)
    assert report.data["frozen_ok"] is promised


def test_growing_a_stream_keeps_every_old_bit_and_detaches_stage_by_stage(world: World) -> None:
    report = run(stream(world, "grown"), QUIET)
    assert report.data["frozen_ok"] is True and report.data["detach_equals_base"] is True
    stages = Run.open(world.runs / "grown", read_only=True).stages()
    assert [stage.name for stage in stages] == ["random", "letters", "digits", "capitals"]
    newest = growable(open_model(stages[-1].folder).model)
    for earlier in reversed(stages[1:-1]):
        apply_plan(newest, plan_detach(newest.config))
        expected = open_model(earlier.folder).model
        assert newest.config == expected.config
        assert tensor_hashes(model_tensors(newest)) == tensor_hashes(model_tensors(expected))


@pytest.mark.parametrize("mode", ["side", "preserve", "compete"])
def test_every_routing_mode_learns_a_stream_with_a_review_after_each_growth(world: World, mode: str) -> None:
    report = run(stream(world, mode, f"growth={mode}", "growth.review.steps=3", "growth.review.batch_size=4"), QUIET)
    assert report.data["frozen_ok"] is True and report.data["detach_equals_base"] is True
    lineage = stages_of(world.runs / mode)[-1].manifest.metadata["lineage"]
    assert isinstance(lineage, list) and lineage[-1]["review"]["new_after"] > 0


def test_row_0_is_the_random_weights_without_a_base_and_the_base_with_one(world: World) -> None:
    first = run(stream(world, "without"), QUIET)
    base = str(first.data["model"])
    named = stream(world, "with", "method=full", f"base='{base}'", domains=(world.digits,))
    second = run(named, QUIET)
    rows = [each.data["matrix"]["nll_per_byte"] for each in (first, second)]
    assert len(rows[0]) == 4 and len(rows[1]) == 2
    assert dict(zip(first.data["domains"], rows[0][-1], strict=True)) == dict(
        zip(second.data["domains"], rows[1][0], strict=True)
    )


def test_a_bystander_is_measured_and_never_counts_as_old(world: World) -> None:
    recipe = replace(stream(world, "watched", domains=(world.letters, world.digits)), bystanders=(str(world.capitals),))
    report = run(recipe, QUIET)
    assert report.data["domains"] == ["letters", "digits", "capitals"]
    assert report.data["learned_in"] == {"letters": 1, "digits": 2, "capitals": None}
    bystanders, metrics = report.data["bystanders"], report.data["metrics"]
    assert isinstance(bystanders, dict) and isinstance(metrics, dict)
    assert set(bystanders["domains"]) == {"capitals"}
    assert set(metrics["gate.false_open"]["domains"]) == {"digits on letters"}


def test_a_domain_may_come_again(world: World) -> None:
    again = (world.letters, world.digits, world.capitals, world.digits)
    report = run(stream(world, "again", domains=again), QUIET)
    names = [stage["name"] for stage in report.data["stages"]]
    assert names == ["random", "letters", "digits", "capitals", "digits-2"]
    assert report.data["learned_in"] == {"letters": 1, "digits": 4, "capitals": 3}
    assert report.data["frozen_ok"] is True


def test_evaluations_inside_stages_are_measured_once_and_change_no_result(world: World) -> None:
    plain = run(stream(world, "plain", "method=full"), QUIET)
    inside = run(
        stream(world, "inside", "method=full", "evaluation.within_every_steps=3", "evaluation.within_max_bytes=1000"),
        QUIET,
    )
    assert inside.data["matrix"] == plain.data["matrix"]
    curves = inside.data["within"]
    assert isinstance(curves, dict)
    assert [step for step, _ in curves["digits"]] == [0, 0, 3, 6, STEPS, STEPS + 3, STEPS + 6, 2 * STEPS]
    metrics = inside.data["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["min_acc"]["value"] is not None
    assert metrics["stability_gap.depth"]["value"] >= 0


@pytest.mark.parametrize(
    ("domains", "overrides"),
    [(1, ()), (2, ("base=no/such/folder",)), (3, ("method=expand", "expand.blocks=9")), (3, ("replay.rate=0",))],
)
def test_what_cannot_be_learned_is_refused_in_one_line(world: World, domains: int, overrides: tuple[str, ...]) -> None:
    named = (world.letters, world.digits, world.capitals)[:domains]
    with pytest.raises(InputError) as caught:
        run(stream(world, f"refused-{domains}-{len(overrides)}", *overrides, domains=named), QUIET)
    assert "\n" not in str(caught.value)


def test_a_dry_run_says_what_every_stage_would_train(world: World) -> None:
    for method in get_args(MethodName):
        recipe = stream(world, f"dry-{method}", f"method={method}")
        report = run(recipe, replace(QUIET, dry_run=True))
        stages = report.data["stages"]
        assert isinstance(stages, list)
        assert [stage["name"] for stage in stages] == (["joint"] if method == "joint" else ["digits", "capitals"])
        assert all(stage["trains"] for stage in stages)
        assert not (world.runs / f"dry-{method}").exists()


@pytest.mark.parametrize("method", ["grow", "lora"])
def test_a_stream_killed_inside_a_stage_and_between_two_ends_with_the_same_bits(
    world: World, server: ForkServerContext, method: str
) -> None:
    often = (f"method={method}", "training.commit_every_steps=2", "evaluation.within_every_steps=3")
    whole, out, log = world.runs / f"whole-{method}", world.runs / f"killed-{method}", world.runs / f"{method}.log"
    run(stream(world, whole.name, *often), QUIET)
    first = stream(world, out.name, *often)
    path = world.runs / f"{method}.yaml"
    mapping = {key: value for key, value in recipe_to_mapping(first).items() if key not in ("logger", "trainer")}
    path.write_text(json.dumps(mapping))
    begin = ["continual", "--recipe", str(path), "--device", "cpu", "--threads", "1"]
    inside = lambda: bool(list((out / "progress" / "003").glob("step-*")))  # noqa: E731
    between = lambda: (out / "stages" / "002-digits").exists()  # noqa: E731
    for ripe in (between, inside):
        words = ["continual", "--resume", str(out)] if is_run_folder(out) else begin
        kill_when(start(server, words, log), ripe)
    assert finish(start(server, ["continual", "--resume", str(out)], log)) == 0, log.read_text()
    assert [stage.manifest.metadata["lineage"][-1]["sha256"] for stage in stages_of(out)[2:]] == [
        stage.manifest.metadata["lineage"][-1]["sha256"] for stage in stages_of(whole)[2:]
    ]
    assert measurements(out) == measurements(whole)


def stages_of(run_folder: Path) -> list[Stage]:
    return Run.open(run_folder, read_only=True).stages()


def measurements(run_folder: Path) -> list[tuple[object, ...]]:
    keys = ("stage", "step", "domain", "split", "nll_nats", "model_sha256")
    rows = Run.open(run_folder, read_only=True).read_ledger()
    return sorted(tuple(str(row[key]) for key in keys) for row in rows)
