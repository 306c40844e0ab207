"""Malformed flags, keys, YAML, data and model folders: exit 2, one line that says what to do, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mfext.cli import main

ROOT = Path(__file__).resolve().parent.parent

FLAGS = {
    "unknown verb": ["grwo"],
    "a flag before the verb": ["--json", "grow"],
    "unknown flag": ["grow", "--recpie", "grow_code"],
    "unknown short flag": ["grow", "-x"],
    "flag without its value": ["grow", "--domain"],
    "flag followed by a flag": ["grow", "--domain", "--json"],
    "flag with an empty value": ["grow", "--out", ""],
    "flag given twice": ["grow", "--seed", "1", "--seed", "2"],
    "value for a switch": ["grow", "--json=yes"],
    "bare word": ["grow", "code"],
    "seed of letters": ["grow", "--seed", "one"],
    "negative seed": ["grow", "--seed", "-1"],
    "seed too large": ["grow", "--seed", "99999999999999"],
    "unknown device": ["grow", "--device", "tpu"],
    "no threads": ["grow", "--threads", "0"],
    "half a thread": ["grow", "--threads", "0.5"],
    "unknown method": ["grow", "--method", "ewcc"],
    "unknown recipe": ["grow", "--recipe", "grow_cod"],
    "missing recipe file": ["grow", "--recipe", "nowhere/mine.yaml"],
    "resume of no run": ["grow", "--resume", "nowhere"],
    "resume with changes": ["grow", "--resume", "nowhere", "training.tokens=9000"],
    "resume with another recipe": ["grow", "--resume", "nowhere", "--recipe", "grow_code"],
    "missing base": ["grow", "--base", "nowhere"],
    "missing tokenizer": ["grow", "--tokenizer", "nowhere/tokenizer.json"],
    "eval without a model": ["eval", "--domain", "code"],
    "eval without a domain": ["eval", "--model", "."],
    "eval of a missing model": ["eval", "--model", "nowhere", "--domain", "code"],
    "eval of an unknown domain": ["eval", "--model", ".", "--domain", "code,cod"],
    "eval of the train split": ["eval", "--model", ".", "--domain", "code", "--split", "train"],
    "eval of an odd window": ["eval", "--model", ".", "--domain", "code", "evaluation.window=7"],
    "eval with a recipe's key": ["eval", "--model", ".", "--domain", "code", "training.tokens=9000"],
    "quantize to no kind": ["quantize", "--model", ".", "--to", "int4"],
    "quantize to nothing": ["quantize", "--model", "."],
    "quantize a missing model": ["quantize", "--model", "nowhere", "--to", "int8"],
    "quantize without a model": ["quantize", "--to", "int8"],
    "quantize measured on an unknown domain": ["quantize", "--model", ".", "--to", "int8", "--domain", "cod"],
    "negative temperature": ["generate", "--model", ".", "--temperature", "-1"],
    "top-p above one": ["generate", "--model", ".", "--top-p", "1.5"],
    "nothing to generate": ["generate", "--model", ".", "--max-new-tokens", "0"],
    "report of nothing": ["report"],
    "report of a missing run": ["report", "nowhere"],
    "two runs to report": ["report", "one", "two"],
    "unknown shell": ["completion", "cmd"],
    "no shell": ["completion"],
}

KEYS = {
    "unknown key": "tokens=9000",
    "misspelled key": "training.tokns=9000",
    "text for a number": "training.tokens=many",
    "fraction for a whole number": "training.batch_size=1.5",
    "truth for a number": "training.batch_size=true",
    "number for truth": "logger.wandb=1",
    "list for a number": "training.tokens=[1,2]",
    "not a number": "training.learning_rate=nan",
    "infinite": "training.learning_rate=inf",
    "null for a number": "training.tokens=null",
    "too few tokens": "training.tokens=10",
    "batch that does not divide": "training.micro_batch_size=5",
    "half precision": "training.precision=fp16",
    "three betas": "training.betas=[0.9,0.95,0.99]",
    "beta of one": "training.betas=[0.9,1.0]",
    "heads that do not divide": "default_base.model.num_heads=7",
    "more chosen than there are": "default_base.model.feedforward_experts_per_token=9",
    "router of no kind": "default_base.model.router=rooter",
    "no layers": "default_base.model.num_layers=0",
    "no new experts": "growth={attention_experts:0,feedforward_experts:0}",
    "layers of no kind": "growth.layers=bottom",
    "mode of no kind": "growth.mode=competing",
    "probe of no kind": "growth.gate.probe=elf",
    "gate always open": "growth.gate.max_false_open=1.0",
    "two devices without ddp": "trainer.devices=2",
    "unknown growth": "growth=competee",
    "unknown training": "training=demoo",
    "path for a group": "model=../../secret",
    "several values without -m": "seed=1,2",
    "removed key": "~training.tokens",
    "key below a value": "seed.inner=1",
    "broken list": "training.betas=[0.9",
    "odd key": "tr@ining.tokens=1",
    "secret of the environment": "domain=${oc.env:HOME}",
    "embedded interpolation": "domain=a${seed}",
    "hydra's own keys": "hydra.run.dir=elsewhere",
    "hydra's launcher": "+hydra/launcher=joblib",
    "target": "_target_=os.system",
    "nested target": "growth.gate={_target_:os.system}",
    "unknown domain": "domain=cod",
    "missing folder": "domain=./nowhere",
    "bad dataset name": "domain=hf:owner",
    "bystander nobody knows": "bystanders=[cod]",
}

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\ndomain: code\n"
YAMLS = {
    "alias bomb": BOMB,
    "anchor": "domain: &d code\n",
    "python object": "domain: !!python/object/apply:os.system [ls]\n",
    "tag": "domain: !secret code\n",
    "too deep": "seed: " + "[" * 200 + "]" * 200 + "\n",
    "too many values": "bystanders: [" + "code, " * 5000 + "]\n",
    "too large": "# " + "x" * 100_000 + "\nseed: 1\n",
    "not UTF-8": b"domain: \xff\xfe\n",
    "control characters": b"domain: \x00\x01\n",
    "not YAML": "domain: [code\nseed 1\n",
    "a list": "- domain\n- code\n",
    "a word": "code\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "same key twice": "seed: 1\nseed: 2\n",
    "unknown key": "domian: code\n",
    "number of many digits": "seed: " + "9" * 5000 + "\n",
    "defaults not a list": "defaults: growth\n",
    "defaults of hydra": "defaults:\n  - override hydra/launcher: joblib\n",
    "defaults into hydra": "defaults:\n  - growth@hydra.job_logging: gated\n",
    "defaults outside": "defaults:\n  - growth: ../../secret\n",
    "defaults by path": "defaults:\n  - /etc/passwd\n",
    "target": "growth:\n  gate:\n    _target_: os.system\n",
    "hydra": "hydra:\n  run:\n    dir: elsewhere\n",
    "secret of the environment": "domain: ${oc.env:HOME}\n",
    "interpolation of an interpolation": "seed: ${training.tokens}\ntraining:\n  tokens: ${seed}\n",
    "interpolation of a group": "training: ${growth}\n",
    "interpolation of nothing": "seed: ${nothing.here}\n",
    "embedded interpolation": "domain: x${seed}y\nseed: 1\n",
    "list for a group": "training: [1, 2]\n",
    "value for a group": "growth: 3\n",
    "null for a group": "training: null\n",
    "date for a number": "seed: 2024-01-01\n",
}


def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run one command line that must be refused; returns its one line."""
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 2, f"{words}: exit {code}: {err}"
    assert out == ""
    assert err.startswith("mfext: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err
    assert len(err) < 700
    return err


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_are_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(FLAGS[case], capsys)


@pytest.mark.parametrize("case", KEYS)
def test_bad_keys_are_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(["grow", "--dry-run", KEYS[case]], capsys)


@pytest.mark.parametrize("case", YAMLS)
def test_bad_yaml_is_refused_in_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    text = YAMLS[case]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(["grow", "--dry-run", "--recipe", str(path)], capsys)


def test_misspellings_are_answered_with_the_right_word(capsys: pytest.CaptureFixture[str]) -> None:
    for words, meant in (
        (["grwo"], "'grow'"),
        (["grow", "--domian", "code"], "'--domain'"),
        (["grow", "--domain", "cod"], "'code'"),
        (["grow", "training.tokns=1"], "'tokens'"),
        (["grow", "growth=gate"], "'gated'"),
        (["grow", "--recipe", "grow_cod"], "'grow_code'"),
    ):
        assert f"did you mean {meant}?" in refuse(words, capsys)


def test_bad_flags_and_keys_are_answered_without_loading_torch() -> None:
    cases = [*FLAGS.values(), *(["grow", "--dry-run", text] for text in KEYS.values())]
    code = (
        "import contextlib, io, json, sys\n"
        "from mfext.cli import main\n"
        "with contextlib.redirect_stderr(io.StringIO()):\n"
        "    codes = {main(words) for words in json.load(sys.stdin)}\n"
        "print(codes, [name for name in ('torch', 'lightning', 'datasets') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "{2} []"
