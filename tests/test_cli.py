"""The command line: parsing, exit codes, one JSON object, help and completion. Commands are stand-ins here."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mfext import __version__
from mfext.cli import main
from mfext.completion import SHELLS, completion_script
from mfext.config import Recipe
from mfext.errors import BudgetError, DivergedError, InterruptedRun, MachineError
from mfext.recipe import config_hash, load_recipe, recipe_to_mapping
from mfext.report.report import Report
from mfext.requests import EvalRequest, GenerateRequest, Invocation
from mfext.verbs import VERBS, find_verb, verb_help

ROOT = Path(__file__).resolve().parent.parent
Seen = list[tuple[Any, Invocation]]


def stand_in(monkeypatch: pytest.MonkeyPatch, verb: str, act: Callable[[], None] = lambda: None) -> Seen:
    """Put a command that records what it was asked in place of the real one; `act` may raise or print."""
    seen: Seen = []

    def run(request: Any, invocation: Invocation) -> Report:
        seen.append((request, invocation))
        act()
        return Report(verb=verb, data={"answer": 42}, title=verb, verdict=("It went well.",))

    found = find_verb(verb)
    assert found is not None
    module = types.ModuleType(found.module)
    module.run = run
    monkeypatch.setitem(sys.modules, found.module, module)
    return seen


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_flags_and_overrides_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stand_in(monkeypatch, "grow")
    words = "grow --domain prose --seed 7 --method full --out there --threads 2 --device cpu -q -v -v growth=compete"
    assert main([*words.split(), "training.tokens=9000", "--dry-run"]) == 0
    ((recipe, invocation),) = seen
    assert (recipe.domain, recipe.seed, recipe.method, recipe.out) == ("prose", 7, "full", "there")
    assert (recipe.growth.mode, recipe.training.tokens) == ("compete", 9000)
    assert (recipe.trainer.threads, recipe.trainer.accelerator) == (2, "cpu")
    assert invocation == Invocation(quiet=True, verbosity=2, dry_run=True, device="cpu", threads=2)


def test_a_value_may_follow_an_equals_sign_or_start_with_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stand_in(monkeypatch, "generate")
    assert main(["generate", "--model=.", "--prompt=a=b", "--prompt", "-1 + 1 =", "--stop", "a,b"]) == 0
    assert seen[0][0] == GenerateRequest(".", prompts=("a=b", "-1 + 1 ="), stop=("a,b",))


def test_a_request_takes_lists_and_nested_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = stand_in(monkeypatch, "eval")
    assert main(["eval", "--model", ".", "--domain", "code,prose", "evaluation.window=64", "--split", "test"]) == 0
    request = seen[0][0]
    assert isinstance(request, EvalRequest)
    assert request.domains == ("code", "prose")
    assert (request.evaluation.window, request.evaluation.split) == (64, "test")


def test_json_is_one_object_on_stdout_with_the_keys_of_every_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "grow", lambda: print("progress that a library prints"))
    assert main(["grow", "--json", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert out.count("\n") == 1
    assert data["answer"] == 42
    assert (data["mfext_version"], data["seed"]) == (__version__, 3)
    assert data["config_hash"] == config_hash(load_recipe("grow", None, ["seed=3"]))
    assert "progress" in err


def test_without_json_the_verdict_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "doctor")
    assert main(["doctor"]) == 0
    assert "It went well." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DivergedError("training diverged", "step 3"), 3, "training diverged: step 3"),
        (MachineError("no space left", "here"), 4, "no space left"),
        (OSError(errno.ENOSPC, "No space left on device", "somewhere"), 4, "somewhere: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "somewhere"), 4, "Permission denied"),
        (MemoryError(), 4, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "not enough memory"),
        (BudgetError("over budget", "forgetting"), 5, "over budget"),
        (InterruptedRun(15, "stopped"), 143, "stopped"),
        (InterruptedRun(2, "stopped"), 130, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (ZeroDivisionError("division by zero"), 1, "bug in mfext"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "bug in mfext"),
        (RuntimeError("two\nlines"), 1, "two lines"),
    ],
)
def test_every_failure_has_its_exit_code_and_one_line(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "grow", raising(error))
    if isinstance(error, BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))  # noqa: SIM115 -- main closes it
    assert main(["grow"]) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == (1 if words else 0)
    assert "Traceback" not in err


def test_a_verb_that_is_terminated_says_so_and_leaves_with_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    former = signal.getsignal(signal.SIGTERM)
    stand_in(monkeypatch, "grow", lambda: signal.raise_signal(signal.SIGTERM))
    assert main(["grow"]) == 143
    assert capsys.readouterr().err == "mfext: error: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == former


def test_no_library_tells_a_termination_as_its_own_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception as error:  # as configuration libraries do, to say where
            raise ValueError("not valid YAML") from error

    stand_in(monkeypatch, "grow", parse)
    assert main(["grow"]) == 143
    assert capsys.readouterr().err == "mfext: error: interrupted\n"


def test_debug_shows_the_traceback_before_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "grow", raising(ZeroDivisionError("division by zero")))
    assert main(["grow", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("mfext: error: ")


def test_a_multirun_plans_a_trial_with_a_folder_of_its_own_for_every_combination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all"
    assert main(["grow", "-m", "growth=gated,compete", "seed=1,2", "--out", str(out), "--dry-run", "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    expected = [{"growth": mode, "seed": seed} for mode in ("gated", "compete") for seed in (1, 2)]
    assert [trial["overrides"] for trial in trials] == expected
    assert len({trial["run"] for trial in trials}) == 4
    assert not out.exists()


def test_a_bad_combination_stops_a_multirun_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grow", "-m", "training.tokens=9000,10", "--out", str(tmp_path / "all")]) == 2
    assert "training.tokens=10" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--jobs", "2"], "add -m to run a sweep"),
        (["-m", "--jobs", "0"], "must be at least 1"),
        (["-m", "--array-job", "pbs"], "must be slurm"),
        (["-m", "--resume", "here"], "the same command with --out"),
        (["-m", "out=a,b"], "a sweep has one folder"),
    ],
)
def test_a_sweep_asked_for_wrongly_is_refused_in_one_line(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grow", *words]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1


def test_a_resumed_run_keeps_its_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = stand_in(monkeypatch, "grow")
    recipe = load_recipe("grow", None, ["seed=5", "training.tokens=9000"])
    (tmp_path / "recipe.json").write_text(json.dumps({"kind": "run", "recipe": recipe_to_mapping(recipe)}))
    assert main(["grow", "--resume", str(tmp_path)]) == 0
    assert main(["grow", "--resume", str(tmp_path), "--threads", "2"]) == 0
    (first, invocation), (second, _) = seen
    assert first == recipe
    assert invocation.resume == str(tmp_path)
    assert isinstance(second, Recipe)
    assert second.trainer.threads == 2


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_has_help_with_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    found = find_verb(verb)
    assert found is not None
    assert found.example in out
    assert all(flag.name in out for flag in found.flags)
    assert max(map(len, verb_help(found).splitlines())) <= 120


def test_help_lists_every_verb_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb.name}" in out for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mfext {__version__}\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_verbs_flags_and_domains(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for word in ("grow", "pretrain", "domain", "unicode_names", "grow_code", "quantize", "int8"):
        assert word in out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mfext gr", {"grow"}),
        ("mfext grow --do", {"--domain"}),
        ("mfext grow --domain pro", {"prose"}),
        ("mfext doctor --th", {"--threads"}),
    ],
)
def test_bash_completes_a_line(line: str, expected: set[str]) -> None:
    script = completion_script("bash", {"--domain": ["code", "prose"]})
    words = line.split()
    code = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _mfext; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_the_module_runs_as_a_program_from_any_directory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-m", "mfext", "grow", "--domain", "cod"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mfext: error: no domain 'cod'")
