"""Every Triton kernel in Triton's interpreter, and the choice of a backend where there is no GPU.

The interpreter is switched on by TRITON_INTERPRET=1 before triton is first imported, so those tests (`interpreted_*`)
run in processes of their own. What passes there is right in its arithmetic; it says nothing about a GPU's speed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfext_kernels.stickbreaking import stickbreaking_attention

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
FILES = sorted(path.name for path in FOLDER.glob("interpreted_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_interpreted_kernels_agree_with_the_reference(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", summary) and "skipped" not in summary, summary


def test_importing_the_kernels_leaves_triton_unloaded() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import mfext_kernels, mfext_kernels.stickbreaking as s\n"
        "q, k = torch.zeros(1, 2, 1, 1, 4), torch.zeros(1, 2, 1, 4); s.stickbreaking_attention(q, k, k)\n"
        "print(before, 'triton' in sys.modules, 'mfext_kernels.stickbreaking.triton' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False"]


@pytest.mark.parametrize(
    ("dtype", "interpreted", "installed", "message"),
    [
        (torch.float32, False, True, "needs CUDA tensors, not cpu; use backend='cpu', or set TRITON_INTERPRET=1"),
        (torch.float32, True, False, "triton is not installed"),
        (torch.float64, True, True, "takes fp32, fp16 and bf16, not torch.float64; use backend='cpu'"),
    ],
)
def test_forcing_triton_where_it_cannot_run_says_what_to_do(
    dtype: torch.dtype, interpreted: bool, installed: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    monkeypatch.setattr("mfext_kernels.backends._importable", lambda: installed)
    q, k = torch.zeros(1, 2, 1, 1, 4, dtype=dtype), torch.zeros(1, 2, 1, 4, dtype=dtype)
    with pytest.raises(ValueError, match=re.escape(message)):
        stickbreaking_attention(q, k, k, None, "triton")


def test_the_gpu_bench_refuses_in_one_line_where_there_is_no_gpu() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "kernels" / "bench" / "gpu.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "kernels/bench/gpu.py: needs a CUDA GPU and finds none; nothing was checked or timed\n"
