"""ModuleFormer against dense transformers at equal validation loss: `make efficiency` (seven minutes, one thread).

Pretrains each contestant on the same tokens by the recipe `efficiency` (a finished run is reused, an interrupted one
continued), times training steps, evaluation and cached decoding of all of them in turns in this process, and writes
docs/results/efficiency.json, .md and .svg. Time is CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from efficiency_page import to_markdown, to_svg  # noqa: E402
from measure import ROOT, surroundings  # noqa: E402
from torch import Tensor  # noqa: E402

from mfext.commands import pretrain  # noqa: E402
from mfext.commands.models import open_model  # noqa: E402
from mfext.config import Recipe  # noqa: E402
from mfext.domains.sources import load_domain  # noqa: E402
from mfext.growth.plan import count_parameters  # noqa: E402
from mfext.metrics.efficiency import Curve, common_levels, compare_efficiency, cost_at_loss  # noqa: E402
from mfext.metrics.ledger import Ledger  # noqa: E402
from mfext.model.language_model import LanguageModel  # noqa: E402
from mfext.model.losses import language_loss, routing_loss  # noqa: E402
from mfext.model.moduleformer import Block, ModuleFormer  # noqa: E402
from mfext.paths import cache_folder  # noqa: E402
from mfext.recipe import load_recipe  # noqa: E402
from mfext.requests import Invocation  # noqa: E402
from mfext.store import Run, is_run_folder  # noqa: E402

REFERENCE = "demo"
# The best of those tried for each at 400 000 tokens (docs/notebook.md).
LEARNING_RATES = {"demo": "3e-3", "dense_demo_active": "6e-3", "dense_demo_total": "3e-3"}
LEVELS = 6
PROMPT, DECODED = 64, 128
Work = Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """One trained model and its losses on the way (nats per byte after so many tokens)."""

    name: str
    recipe: Recipe
    model: LanguageModel
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    final_loss: float
    trained_wall_s: float

    @property
    def tokens(self) -> tuple[int, ...]:
        training = self.recipe.default_base.training
        return tuple(step * training.batch_size * training.sequence_length for step in self.steps)


def trained(name: str, folder: Path, overrides: Sequence[str]) -> Contestant:
    """The contestant of this name: pretrained now, continued, or read from its finished run."""
    path = folder / name
    changes = [f"model={name}", f"training.learning_rate={LEARNING_RATES[name]}", *overrides]
    recipe = load_recipe("pretrain", "efficiency", changes, {"out": str(path), "trainer.threads": 1})
    resume = str(path) if is_run_folder(path) else None
    if resume is None or not (path / "metrics.json").is_file():
        pretrain.run(recipe, Invocation(quiet=True, device="cpu", threads=1, resume=resume))
    opened = Run.open(path, read_only=True)
    ledger = Ledger.from_json(opened.read_ledger())
    rows = sorted((row for row in ledger if row.split == "within"), key=lambda row: row.step)
    (final,) = (row for row in ledger if row.split == recipe.evaluation.split)
    losses = tuple(loss for row in rows if (loss := row.nats_per_byte) is not None)
    assert final.nats_per_byte is not None and len(losses) == len(rows)
    loaded = open_model(path)
    lineage = loaded.metadata["lineage"]
    assert isinstance(lineage, list)
    steps = tuple(row.step for row in rows)
    return Contestant(name, recipe, loaded.model, steps, losses, final.nats_per_byte, lineage[-1]["wall_s"])


def in_turns(works: Mapping[str, Work], times: int) -> dict[str, float]:
    """Median CPU seconds of each, taken in turns so that a noisy moment meets them all; each is run once before."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(times):
        for name, work in works.items():
            begun = time.process_time()
            work()
            taken[name].append(time.process_time() - begun)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def train_step(contestant: Contestant, ids_BT: Tensor) -> Work:
    """Forward, backward and AdamW on one batch, as training does it; on a copy of the trained weights."""
    model = open_model(Path(str(contestant.recipe.out))).model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    starts_BT = torch.zeros_like(ids_BT[:, 1:])
    weight, kind = model.config.routing_loss_weight, model.config.routing_loss

    def work() -> None:
        optimizer.zero_grad()
        output = model(ids_BT[:, :-1], document_starts=starts_BT)
        loss = language_loss(output.logits, ids_BT[:, 1:])
        if weight:
            loss = loss + weight * routing_loss(output.routings, None, kind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return work


def evaluation(contestant: Contestant, ids_BT: Tensor) -> Work:
    """One forward without gradients."""

    @torch.inference_mode()
    def work() -> None:
        contestant.model(ids_BT)

    return work


def decoding(model: LanguageModel, prompt_1T: Tensor, compiled: bool) -> Work:
    """DECODED tokens of one sequence after a prompt, greedily, with a cache.

    Not `compiled`: a ModuleFormer takes its step through torch, as the dense models do, which have no compiled one.
    """

    @torch.no_grad()
    def work() -> None:
        cache = model.new_cache(1, prompt_1T.shape[1] + DECODED)
        if isinstance(model, ModuleFormer) and not compiled:
            cache.weights = tuple(block.weights() for block in model.blocks if isinstance(block, Block))
        logits = model(prompt_1T, cache=cache).logits[:, -1]
        for _ in range(DECODED):
            logits = model(logits.argmax(-1, keepdim=True), cache=cache).logits[:, -1]

    return work


def timed(contestants: Sequence[Contestant], times: int) -> dict[str, dict[str, float]]:
    """Tokens per CPU second of every contestant: training, evaluation, decoding."""
    training = contestants[0].recipe.default_base.training
    batch, length = training.batch_size, training.sequence_length
    domain = load_domain(contestants[0].recipe.domain, known={}, cache_folder=cache_folder() / "domains")
    text = torch.tensor(list("".join(domain.validation).encode())[: batch * (length + 1)])
    ids_BT = text.view(batch, length + 1)
    steps = in_turns({each.name: train_step(each, ids_BT) for each in contestants}, times)
    forwards = in_turns({each.name: evaluation(each, ids_BT[:, :-1]) for each in contestants}, times)
    works = {each.name: decoding(each.model, ids_BT[:1, :PROMPT], True) for each in contestants}
    plain = {each.name: decoding(each.model, ids_BT[:1, :PROMPT], False) for each in contestants}
    decoded = in_turns(works | {f"{name} torch": work for name, work in plain.items()}, times)
    return {
        each.name: {
            "train": batch * length / steps[each.name],
            "evaluate": batch * length / forwards[each.name],
            "decode": DECODED / decoded[each.name],
            "decode_torch": DECODED / decoded[f"{each.name} torch"],
        }
        for each in contestants
    }


def results(contestants: Sequence[Contestant], speeds: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    """Everything the page says, as plain JSON. Losses in nats per byte, times in CPU seconds of one thread."""
    curves = [
        Curve(each.name, each.tokens, tuple(tokens / speeds[each.name]["train"] for tokens in each.tokens), each.losses)
        for each in contestants
    ]
    ends = {min(curve.loss) for curve in curves}
    levels = compare_efficiency(curves, REFERENCE, sorted({*common_levels(curves, LEVELS), *ends}, reverse=True))
    models = {}
    for each in contestants:
        counts = count_parameters(each.model.config)
        models[each.name] = {
            "parameters": counts.total,
            "active_per_token": counts.active_per_token,
            "learning_rate": each.recipe.default_base.training.learning_rate,
            "final_loss": each.final_loss,
            "trained_wall_s": each.trained_wall_s,
            "tokens_per_cpu_s": dict(speeds[each.name]),
        }
    dense = [each for each in contestants if each.name != REFERENCE]
    (own,) = (each for each in contestants if each.name == REFERENCE)
    equal = {}
    for kind in ("evaluate", "decode", "decode_torch"):
        points = [(each.final_loss, 1 / speeds[each.name][kind]) for each in dense]
        cost, reason = cost_at_loss(points, own.final_loss)
        equal[kind] = {
            "dense_over_reference": None if cost is None else cost * speeds[REFERENCE][kind],
            "reason": reason,
        }
    return {
        "reference": REFERENCE,
        "tokens": contestants[0].recipe.default_base.training.tokens,
        "domain": Path(contestants[0].recipe.domain).name,
        "seed": contestants[0].recipe.seed,
        "models": models,
        "curves": [asdict(curve) for curve in curves],
        "levels": [asdict(level) for level in levels],
        "inference_at_equal_loss": equal,
        "surroundings": surroundings(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "efficiency", help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the results go")
    parser.add_argument("--times", type=int, default=15, help="repetitions of each timing")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, the same for every contestant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    contestants = [trained(name, arguments.runs, arguments.overrides) for name in LEARNING_RATES]
    data = results(contestants, timed(contestants, arguments.times))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "efficiency.json").write_text(json.dumps(data, indent=1) + "\n")
    (arguments.out / "efficiency.svg").write_text(to_svg(data))
    page = to_markdown(data)
    (arguments.out / "efficiency.md").write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
