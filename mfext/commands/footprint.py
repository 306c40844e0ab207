"""What a committed model weighs and how fast it reads and writes, for a before and after."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from mfext.commands.models import load_model, open_model
from mfext.commands.rivals import decode
from mfext.config import ModelConfig
from mfext.growth.plan import count_parameters
from mfext.metrics.speed import Run, peak_kb
from mfext.model.build import new_model
from mfext.model.language_model import LanguageModel

TINY = ModelConfig(d_model=16, num_layers=1, num_heads=2, d_attention=16, d_feedforward=16, d_router=8)
PROMPT, DECODED, READ, SIDE_BY_SIDE, TIMES = 64, 32, 256, 16, 5


def footprint(folder: Path) -> dict[str, object]:
    """Parameters, bytes on disk, peak memory of loading and reading `PROMPT` tokens, tokens read and decoded a second.

    The peak is over what a process holds that has run a tiny model; speeds are medians of `TIMES` runs in processor
    time, of `READ` tokens of one sequence at once and of `DECODED` one after another: of one sequence, and of
    `SIDE_BY_SIDE`, whose tokens are counted together and whose experts are read once for all that chose them.
    """
    model = open_model(folder).model
    generator = torch.Generator().manual_seed(0)
    prompts_BT, read_BT = (
        torch.randint(0, model.config.vocab_size, shape, generator=generator)
        for shape in ((SIDE_BY_SIDE, PROMPT), (1, READ))
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(_peak_bytes, folder, torch.get_num_threads()).result()
    return {
        "params": count_parameters(model.config).total,
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "peak_bytes": peak,
        "read_tokens_per_s": READ / _seconds(lambda: _read(model, read_BT)),
        "decode_tokens_per_s": DECODED / _seconds(decode(model, prompts_BT[:1], DECODED)),
        f"decode_{SIDE_BY_SIDE}_tokens_per_s": SIDE_BY_SIDE * DECODED / _seconds(decode(model, prompts_BT, DECODED)),
    }


def _seconds(run: Run) -> float:
    """Processor time, the median after one run to warm up."""
    run()
    spent = []
    for _ in range(TIMES):
        begun = time.process_time()
        run()
        spent.append(time.process_time() - begun)
    return max(statistics.median(spent), 1e-9)


@torch.inference_mode()
def _read(model: LanguageModel, ids_BT: Tensor) -> None:
    model(ids_BT)


def _peak_bytes(folder: Path, threads: int) -> int:
    torch.set_num_threads(threads)
    ids_BT = torch.zeros(1, PROMPT, dtype=torch.long)
    _read(new_model(TINY), ids_BT)  # what the libraries take at their first call is no model's
    start = peak_kb()
    _read(load_model(folder), ids_BT)
    return (peak_kb() - start) * 1024
