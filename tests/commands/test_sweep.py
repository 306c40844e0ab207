"""Sweeps: every combination once, whatever is killed, stopped, failed, repaired, extended or run by a batch system."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mfext.cli import main
from mfext.commands import pretrain, trial
from mfext.commands.array_job import ranges
from mfext.commands.sweep import order_sweep
from mfext.commands.trial_processes import exit_code_of, share_of_cores
from mfext.config import Recipe
from mfext.errors import DivergedError, InterruptedRun, LockedError
from mfext.recipe import config_hash, load_recipe, recipe_to_mapping
from mfext.report.report import Report
from mfext.report.terminal import Console
from mfext.requests import Invocation, TrialRequest
from mfext.store_files import lock_run
from mfext.store_sweep import Sweep
from mfext.verbs import VERBS
from tests.commands.tiny_world import QUIET, TINY, World

QUICK = (
    *TINY,
    "default_base.training.tokens=4096",
    "training.tokens=4096",
    "training.commit_every_steps=1",
    "growth.gate.steps=5",
    "growth.gate.probe_sequences=8",
    "evaluation.max_bytes=2048",
    "evaluation.bootstrap_samples=50",
)
AXES = ("method=full,grow", "seed=11,12")
PATIENCE_S = 300.0
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


def words(world: World, out: Path, *more: str) -> list[str]:
    """A sweep's command line."""
    base = f"default_base.domains=['{world.letters}']"
    return ["grow", "-m", "--domain", str(world.digits), "--out", str(out), base, *QUICK, *more]


def begin(line: list[str], folder: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "mfext", *line]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(process.returncode, out, err)


def run(line: list[str], folder: Path | None = None) -> Ended:
    return end(begin(line, folder))


def wait_until(ripe: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a moment in the life of a process, or for its end where the moment was too short to be seen."""
    deadline = time.monotonic() + PATIENCE_S
    while not ripe() and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not happen in time: {end(process)}")
        time.sleep(0.01)


def table(path: Path, name: str = "table.csv") -> list[dict[str, str]]:
    with (path / name).open(newline="") as file:
        return list(csv.DictReader(file))


def results(path: Path) -> list[str]:
    """Trial ids in results.jsonl, in the order they were appended."""
    return [json.loads(line)["trial"] for line in (path / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(world: World) -> Path:
    """Four trials two at a time, undisturbed; those of one seed need the same base at the same moment."""
    ended = run(words(world, world.runs / "swept", *AXES, "--jobs", "2"))
    assert ended.code == 0, ended.err
    return world.runs / "swept"


@pytest.mark.slow
def test_a_sweep_tells_what_every_combination_learned_and_forgot(swept: Path) -> None:
    rows = table(swept)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("full", "11"), ("full", "12"), ("grow", "11"), ("grow", "12"),
    ]  # fmt: skip
    assert all(row["state"] == "done" for row in rows)
    assert [row["frozen_ok"] for row in rows] == ["", "", "true", "true"]
    assert sorted(results(swept)) == sorted(row["trial"] for row in rows)
    for row in rows:
        run_json = json.loads((swept / "trials" / row["trial"] / "metrics.json").read_text())
        last = dict(zip(run_json["domains"], run_json["matrix"]["nll_per_byte"][-1], strict=True))
        assert float(row["nll_per_byte.letters"]) == last["letters"]
        assert float(row["nll_per_byte.digits"]) == last["digits"]
        assert float(row["forgetting.mean"]) == run_json["forgetting"]["mean"]["difference"]
        assert float(row["learned.digits"]) == run_json["learned"]["digits"]["difference"] < 0
        assert int(float(row["params.total"])) == run_json["params"]["total"]
    assert not re.search(r"wall|tokens_per_s|/", (swept / "table.csv").read_text())
    costs = table(swept, "costs.csv")
    assert [row["trial"] for row in costs] == [row["trial"] for row in rows]
    assert all(float(row["wall_s"]) > 0 for row in costs)
    assert {"report.html", "report.md", "metrics.json"} <= {path.name for path in swept.iterdir()}


@pytest.mark.slow
def test_trials_that_share_a_base_train_it_once(swept: Path) -> None:
    logs = [path.read_text() for path in (swept / "logs").iterdir()]
    assert len(logs) == 4
    assert sum("base: pretraining on letters" in log for log in logs) == 2
    assert all(re.search("base: (pretraining|waiting|reusing)", log) for log in logs)


@pytest.mark.slow
def test_a_sweep_run_again_runs_nothing_and_a_rebuilt_report_says_the_same(
    world: World, swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (swept / name).read_bytes() for name in ("sweep.json", "results.jsonl", "table.csv")}
    assert main(words(world, swept, *AXES, "--json")) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"mfext_version", "seed", "config_hash", "sweep", "verb", "axes", "trials", "groups"} <= data.keys()
    assert data["axes"] == {"method": ["full", "grow"], "seed": [11, 12]}
    assert data["seed"] is None
    for trial_ in data["trials"]:
        assert trial_["state"] == "done" and trial_["error"] is None
        assert (swept / trial_["run"]).is_dir()
    (swept / "table.csv").unlink()
    assert main(["report", str(swept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"] == data["axes"]
    assert {name: (swept / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_sweep_killed_and_stopped_and_run_again_has_the_table_of_one_that_never_was(
    world: World, swept: Path
) -> None:
    out = world.runs / "killed-sweep"
    line = words(world, out, "method=full,grow", "seed=11", "--jobs", "2")
    process = begin(line)
    # From the first committed step on, or, where that was too short to be seen, from the first committed stage.
    wait_until(lambda: any(out.glob("trials/*/progress/001/step-*")) or any(out.glob("trials/*/stages/001")), process)
    assert process.poll() is None, end(process)
    children = psutil.Process(process.pid).children()
    process.kill()
    end(process)
    assert psutil.wait_procs(children, timeout=PATIENCE_S)[1] == []
    process = begin(line)
    wait_until((out / "results.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    stopped = end(process)
    last = stopped.err.splitlines()[-1]
    if stopped.code != 0:  # the second trial may have ended beside the first
        assert stopped.code == 143
        assert last == f"mfext: error: sweep stopped by SIGTERM: {out}: the same command with --out {out} continues it"
        assert "waiting" in {row["state"] for row in table(out)}
    ended = run(line)
    assert ended.code == 0, ended.err
    assert [{**row, "seed": "11"} for row in table(out)] == [row for row in table(swept) if row["seed"] == "11"]
    assert sorted(results(out)) == sorted(row["trial"] for row in table(out))
    assert not (out / "failures.jsonl").exists()
    assert not list(out.rglob(".mfext-tmp*"))


@pytest.mark.slow
def test_a_bad_trial_is_told_and_stops_no_other_and_is_tried_again_once_repaired(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.digits, tmp_path / "broken")
    (tmp_path / "broken" / "validation.jsonl").write_text("this is no JSON\n")
    domains = f"domain='{tmp_path / 'broken'}','{world.capitals}'"
    base = f"default_base.domains=['{world.letters}']"
    line = ["grow", "-m", "--out", str(tmp_path / "sweep"), base, *QUICK, "method=full", "seed=11", domains, "--json"]
    first = run(line)
    assert first.code == 2
    assert "1 of 2 trials failed" in first.err.splitlines()[-1]
    trials = json.loads(first.out)["trials"]
    assert [each["state"] for each in trials] == ["failed", "done"]
    assert "validation.jsonl" in trials[0]["error"]
    shutil.copy(world.digits / "validation.jsonl", tmp_path / "broken")
    more = f"{domains},'{world.digits}'"
    second = run([*line[:-2], more, "--json"])
    assert second.code == 0, second.err
    trials = json.loads(second.out)["trials"]
    assert [(each["state"], each["attempts"]) for each in trials] == [("done", 2), ("done", 1), ("done", 1)]
    assert results(tmp_path / "sweep") == [trials[number]["id"] for number in (1, 0, 2)]


@pytest.mark.slow
def test_an_array_job_runs_each_trial_by_its_number_from_anywhere(world: World, tmp_path: Path) -> None:
    out = tmp_path / "a sweep"
    line = words(world, out, "method=full", "seed=11,12", "--array-job", "slurm")
    assert main(line) == 0
    script = (out / "submit.sh").read_text()
    assert subprocess.run(["bash", "-n", str(out / "submit.sh")]).returncode == 0
    assert "#SBATCH --array=0-1\n" in script and "#SBATCH --signal=B:TERM@120\n" in script
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SLURM_ARRAY_TASK_ID": "1"}
    submitted = ["bash", str(out / "submit.sh")]
    done = subprocess.run(submitted, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (out / "logs" / "task-1.log").read_text()
    assert results(out) == [Sweep.read(out).trial(1).id]
    assert main(line) == 0
    assert "#SBATCH --array=0\n" in (out / "submit.sh").read_text()
    assert main(["report", str(out)]) == 0
    assert [row["state"] for row in table(out)] == ["waiting", "done"]


@pytest.mark.slow
def test_trials_may_train_on_several_processes_themselves(world: World, tmp_path: Path) -> None:
    both = ("method=full", "seed=11", "training.micro_batch_size=4", "trainer=single,ddp", "--jobs", "2")
    ended = run(words(world, tmp_path / "sweep", *both))
    assert ended.code == 0, ended.err
    single, two = table(tmp_path / "sweep")
    assert (single["trainer"], two["trainer"]) == ("single", "ddp")
    # The sums are taken in another order; eight steps of AdamW carry that into the fourth digit at most.
    assert float(two["nll_per_byte.digits"]) == pytest.approx(float(single["nll_per_byte.digits"]), rel=2e-3)


def test_every_sweep_in_the_documentation_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    mfext (\w+ -m .+)$", (ROOT / "docs" / "sweeps.md").read_text(), re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        assert main([*shlex.split(line), "--dry-run", "--json"]) == 0, capsys.readouterr().err
        assert len(json.loads(capsys.readouterr().out)["trials"]) > 1
    assert list(tmp_path.iterdir()) == []


def test_the_documented_script_for_ray_runs_every_trial_and_keeps_the_first_failure(
    world: World, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text()
    (script,) = re.findall(r"^```python\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    # What the script needs of ray, at once and in this process.
    (tmp_path / "ray.py").write_text(
        "def init(): ...\n"
        "def get(codes): return codes\n"
        "def remote(**resources):\n"
        "    def wrap(function): function.remote = function; return function\n"
        "    return wrap\n"
    )
    order = order_sweep("pretrain", None, ["seed=1,2"], {"domain": str(world.letters), "out": str(tmp_path / "sweep")})
    with Sweep.held(order.path, order.plan) as sweep:
        sweep.record_result(sweep.trial(0), {})
        (sweep.path / "trials" / sweep.trial(1).id).write_text("a file where the run should be")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, str(tmp_path / "script.py"), str(sweep.path)], env=environment)
    assert done.returncode == 2
    assert list(sweep.failures()) == [sweep.trial(1).id]


def test_a_trial_is_known_by_its_recipe_and_not_by_its_place(tmp_path: Path) -> None:
    here = order_sweep("grow", None, ["method=grow,full", "seed=1,1"], {"out": str(tmp_path)})
    there = order_sweep("grow", None, ["method=grow,full"], {"out": "elsewhere", "seed": 1})
    assert here.path == tmp_path
    assert [each.id for each in here.plan.trials] == [each.id for each in there.plan.trials]
    recipe = load_recipe("grow", None, ["method=full"], {"out": "anywhere"})
    assert there.plan.trials[1].id == config_hash(recipe)[:16]
    assert there.plan.axes() == {"method": ["grow", "full"]}


def test_a_sweep_without_a_folder_takes_the_first_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert order_sweep("grow", None, ["seed=1,2"]).path == Path("runs/sweep-grow")
    (tmp_path / "runs" / "sweep-grow").mkdir(parents=True)
    assert order_sweep("grow", None, ["seed=1,2"]).path == Path("runs/sweep-grow-2")


def test_every_verb_that_takes_a_recipe_can_be_swept() -> None:
    for verb in VERBS:
        if verb.takes == "recipe":
            assert verb.module == f"mfext.commands.{verb.name}"
            assert len(order_sweep(verb.name, None, ["seed=1,2"]).plan.trials) == 2


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([5, 0, 1, 7, 8], "0-1,5,7-8"), ([3, 9], "3,9")]
)
def test_an_array_names_only_the_tasks_left(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (3, 3), (143, 143), (-9, 4), (-11, 139)])
def test_a_process_that_a_signal_ended_has_an_exit_code_too(ended: int, code: int) -> None:
    assert exit_code_of(ended) == code


def test_trials_and_their_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    (one,) = order_sweep("grow", None, ["seed=1"]).plan.trials
    (two,) = order_sweep("grow", None, ["seed=1", "trainer=ddp"]).plan.trials
    assert (share_of_cores(one, 4), share_of_cores(two, 4), share_of_cores(two, 100)) == (4, 2, 1)


@dataclass
class Stage:
    """A sweep of one trial whose verb is a stand-in."""

    sweep: Sweep
    seen: list[tuple[Recipe, Invocation]]
    act: Callable[[], None]

    def run(self, **how: Any) -> Report:
        return trial.run(TrialRequest(str(self.sweep.path), 0), replace(QUIET, **how))


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    order = order_sweep("grow", None, ["seed=1"], {"out": str(tmp_path / "sweep")})
    with Sweep.held(order.path, order.plan) as sweep:
        made = Stage(sweep, [], lambda: None)

    def command(recipe: Recipe, invocation: Invocation) -> Report:
        made.seen.append((recipe, invocation))
        made.act()
        return Report("grow", {"answer": 42}, "grow")

    module = types.ModuleType("mfext.commands.grow")
    module.run = command
    monkeypatch.setitem(sys.modules, "mfext.commands.grow", module)
    return made


def test_a_trial_is_recorded_once_and_left_alone_when_it_is_done(stage: Stage) -> None:
    assert stage.run(threads=None).data == {"answer": 42}
    assert stage.run(threads=None).data == {"answer": 42}
    ((recipe, invocation),) = stage.seen
    only = stage.sweep.trial(0)
    assert recipe.out == str(stage.sweep.run_folder(only)) and invocation.resume is None
    assert config_hash(recipe)[:16] == only.id
    assert stage.sweep.results() == {only.id: {"answer": 42}}


def test_a_share_of_the_cores_is_taken_only_where_no_threads_were_asked_for(stage: Stage) -> None:
    stage.run(threads=3)
    assert stage.seen[0][0].trainer.threads == stage.seen[0][1].threads == 3


def test_a_torn_folder_begins_anew_and_one_with_a_recipe_is_continued(stage: Stage) -> None:
    folder = stage.sweep.run_folder(stage.sweep.trial(0))
    (folder / "stages").mkdir(parents=True)
    (folder / ".lock").touch()
    stage.act = _raiser(InterruptedRun(15, "stopped"))
    with pytest.raises(InterruptedRun):
        stage.run()
    (folder / "recipe.json").write_text(json.dumps(recipe_to_mapping(stage.seen[0][0])))
    stage.act = lambda: None
    stage.run()
    assert [invocation.resume for _, invocation in stage.seen] == [None, str(folder)]
    assert stage.sweep.failures() == {}


@pytest.mark.parametrize("error", [DivergedError("training diverged", "step 3"), ZeroDivisionError("by zero")])
def test_a_failure_is_kept_and_raised(stage: Stage, error: BaseException) -> None:
    stage.act = _raiser(error)
    with pytest.raises(type(error)):
        stage.run()
    kind = "ZeroDivisionError: " if isinstance(error, ZeroDivisionError) else ""
    assert stage.sweep.failures() == {stage.sweep.trial(0).id: [f"{kind}{error}"]}
    assert stage.sweep.results() == {}


def test_a_trial_waits_for_the_process_that_still_has_its_run(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stage.sweep.run_folder(stage.sweep.trial(0))
    folder.mkdir()
    held = lock_run(folder)
    threading.Timer(0.5, os.close, [held]).start()
    stage.run()
    monkeypatch.setattr(trial, "LOCK_PATIENCE_S", 0.1)
    (stage.sweep.path / "results.jsonl").unlink()
    held = lock_run(folder)
    with pytest.raises(LockedError):
        stage.run()
    os.close(held)


def _raiser(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_a_base_in_the_making_is_waited_for(world: World, tmp_path: Path) -> None:
    recipe, folder = world.recipe("unused"), tmp_path / "base"
    maker = pretrain.open_run(folder, recipe, "pretrain", resume=False)
    held: list[Path] = []

    def hold() -> None:
        with pretrain._hold_base(folder, recipe, Console.silent()) as opened:
            held.append(opened.path)

    second = threading.Thread(target=hold)
    second.start()
    second.join(0.5)
    assert second.is_alive() and not held
    maker.close()
    second.join(PATIENCE_S)
    assert held == [folder]
