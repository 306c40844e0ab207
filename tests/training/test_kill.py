from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from mfext.training.exchange import ProgressState
from mfext.training.fit import fit
from tests.training.tiny_training import (
    Commits,
    TinyStream,
    same_bits,
    tiny_module,
    tiny_settings,
    tiny_training,
    weights,
)

torch.set_num_threads(1)
TRAINING = tiny_training(40, commit_every_steps=7, log_every_steps=1)

CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from mfext.training.fit import fit
from tests.training.test_kill import TRAINING
from tests.training.tiny_training import TinyStream, tiny_module, tiny_settings

folder = Path(sys.argv[1])

def commit(step, tensors, state):
    save_file({name: value.clone() for name, value in tensors.items()}, folder / f"{step}.tensors")
    (folder / f"{step}.json").write_text(json.dumps(state))

class Killer:
    def start(self, total, done, label): ...
    def update(self, done, numbers):
        if done == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    def close(self): ...

fit(tiny_module(True), TinyStream(), tiny_settings(folder / "log", TRAINING), commit=commit, progress=Killer())
"""


def test_a_run_killed_in_another_process_ends_with_the_weights_of_the_uninterrupted_one(
    tmp_path: Path,
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path), "17"]
    child = subprocess.run(command, env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    step = max(int(path.stem) for path in tmp_path.glob("*.json"))
    assert step == 14
    state = json.loads((tmp_path / f"{step}.json").read_text())
    progress = ProgressState(step, load_file(tmp_path / f"{step}.tensors"), state)
    resumed, whole = tiny_module(True), tiny_module(True)
    result = fit(resumed, TinyStream(), tiny_settings(tmp_path / "log", TRAINING), commit=Commits(), resume=progress)
    fit(whole, TinyStream(), tiny_settings(tmp_path / "whole", TRAINING), commit=Commits())
    assert same_bits(weights(resumed), weights(whole)) and result.frozen_ok and not result.notes
    lines = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("log", "whole")]
    assert [line.split(",")[:6] for line in lines[0]] == [line.split(",")[:6] for line in lines[1]]
