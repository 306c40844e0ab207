"""What a committed model weighs and how fast it writes, for a before and after."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from pathlib import Path

import torch

from mfext.commands.models import load_model, open_model
from mfext.commands.rivals import decode
from mfext.growth.plan import count_parameters
from mfext.metrics.speed import peak_kb

PROMPT, DECODED, TIMES = 64, 32, 5


def footprint(folder: Path) -> dict[str, object]:
    """Parameters, bytes on disk, peak memory of loading and reading `PROMPT` tokens, decoded tokens a second.

    The peak is over what a fresh process holds before; the speed is the median of `TIMES` runs of `DECODED` tokens of
    one sequence, in processor time.
    """
    model = open_model(folder).model
    prompt_BT = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    run, spent = decode(model, prompt_BT, DECODED), []
    for _ in range(TIMES):
        begun = time.process_time()
        run()
        spent.append(time.process_time() - begun)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peak = pool.apply(_peak_bytes, (folder, torch.get_num_threads()))
    return {
        "params": count_parameters(model.config).total,
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "peak_bytes": peak,
        "decode_tokens_per_s": DECODED / max(statistics.median(spent), 1e-9),
    }


def _peak_bytes(folder: Path, threads: int) -> int:
    torch.set_num_threads(threads)
    start = peak_kb()
    model = load_model(folder)
    with torch.inference_mode():
        model(torch.zeros(1, PROMPT, dtype=torch.long))
    return (peak_kb() - start) * 1024
