"""A run that is killed or stopped at any moment and continued ends with the bits of the one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from mfext.commands import report
from mfext.commands.models import open_model
from mfext.report.report import Report
from mfext.requests import ReportRequest
from mfext.store import Run, is_run_folder
from tests.commands.child_process import finish, fork_server, kill_when, start
from tests.commands.tiny_world import QUIET, World

OFTEN = "training.commit_every_steps=3"


@pytest.fixture
def uninterrupted(grown: Report) -> Path:
    """The run nobody disturbs."""
    return Path(str(grown.data["run"]))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServerContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield fork_server()


def measurements(run: Path) -> list[tuple[object, ...]]:
    keys = ("stage", "step", "domain", "split", "nll_nats", "document_nats", "tokens", "model_sha256")
    return [tuple(str(row[key]) for key in keys) for row in Run.open(run, read_only=True).read_ledger()]


def assert_same(run: Path, whole: Path) -> None:
    """Weights, matrix and every document's loss are equal to the last bit."""
    assert open_model(run).sha256 == open_model(whole).sha256
    assert measurements(run) == measurements(whole)
    proof = json.loads((run / "frozen.json").read_text())
    assert proof["frozen_ok"] is True and proof["detach_equals_base"] is True
    assert not list((run / "progress").rglob("step-*")) and not list(run.rglob(".mfext-tmp*"))


def again(world: World, name: str, *overrides: str) -> list[str]:
    """What a user types after a crash: resume where a run has begun, else the same words."""
    out = world.runs / name
    return ["grow", "--resume", str(out)] if is_run_folder(out) else world.words(name, *overrides)


def has_progress(out: Path, at_least: int = 1) -> Callable[[], bool]:
    return lambda: len(list((out / "progress" / "001").glob("step-*"))) >= at_least


def after(seconds: float) -> Callable[[], bool]:
    begun = time.monotonic()
    return lambda: time.monotonic() - begun > seconds


def test_a_run_killed_at_random_moments_ends_with_the_bits_of_the_uninterrupted_one(
    world: World, uninterrupted: Path, server: ForkServerContext
) -> None:
    out, log, seed = world.runs / "killed", world.runs / "killed.log", random.randrange(1_000_000)
    print(f"moments drawn with seed {seed}")
    chance = random.Random(seed)
    moments = [after(chance.uniform(0.2, 3)), has_progress(out, 2), after(chance.uniform(0.2, 3))]
    kills = [kill_when(start(server, again(world, "killed", OFTEN), log), moment) for moment in moments]
    assert any(kills)
    if Run.open(out, read_only=True).read_ledger():
        partial = report.run(ReportRequest(str(out)), QUIET)
        assert partial.data["finished"] or any("NOT FINISHED" in alarm for alarm in partial.alarms)
    assert finish(start(server, again(world, "killed", OFTEN), log)) == 0, log.read_text()
    assert_same(out, uninterrupted)


def test_a_stopped_run_leaves_with_143_and_continues_to_the_same_bits(
    world: World, uninterrupted: Path, server: ForkServerContext
) -> None:
    out, log = world.runs / "stopped", world.runs / "stopped.log"
    process = start(server, world.words("stopped", OFTEN, "--json"), log)
    assert kill_when(process, has_progress(out), signal.SIGTERM)
    assert finish(process) == 143
    last = log.read_text().splitlines()[-1]
    assert last.startswith("mfext: error: stopped by SIGTERM after step") and "--resume" in last
    steps = {path.name for path in (out / "progress" / "001").iterdir()}
    assert f"step-{int(last.split('step ')[1].split()[0]):08d}" in steps
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "mfext", "grow", "--resume", str(out), "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    data = json.loads(done.stdout)
    assert data["finished"] and data["frozen_ok"] and data["identity_at_growth"] == 0
    assert "continuing from step" in done.stderr
    assert_same(out, uninterrupted)


@pytest.mark.slow
def test_two_processes_grow_what_one_grows(world: World, uninterrupted: Path) -> None:
    two = ("trainer=ddp", "trainer.devices=2", "trainer.threads=1", "training.micro_batch_size=4")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "mfext", *world.words("two", *two), "--json"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["frozen_ok"] is True and data["detach_equals_base"] is True
    whole = json.loads((uninterrupted / "metrics.json").read_text())
    assert data["tokens"] == whole["tokens"]
    assert data["matrix"]["nll_per_byte"][0] == whole["matrix"]["nll_per_byte"][0]
    # The sums are taken in another order; forty steps of AdamW carry that into the fourth digit at most.
    for ours, theirs in zip(data["matrix"]["nll_per_byte"][1], whole["matrix"]["nll_per_byte"][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)
