"""A dense base through the commands: pretrained, measured while it trains, continued, and refused growth."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfext.commands import grow, inspect, pretrain
from mfext.commands.models import load_model
from mfext.config import Recipe
from mfext.errors import InputError
from mfext.metrics.ledger import Ledger
from mfext.model.dense import DenseTransformer
from mfext.model.generate import Sampling, pad_left
from mfext.recipe import load_recipe
from mfext.requests import InspectRequest
from mfext.store import Run
from tests.commands.tiny_world import QUIET, TINY, World

DENSE = (
    "model=dense_demo_active",
    "default_base.model.d_model=32",
    "default_base.model.d_attention=32",
    "default_base.model.d_feedforward=32",
    "default_base.model.num_layers=2",
    "training.learning_rate=1e-2",
)
STEPS = 40  # 20480 tokens of tiny_world in batches of 8 x 64


def recipe_of(world: World, out: str, *overrides: str) -> Recipe:
    own = [each for each in TINY if not each.startswith(("model=", "growth", "default_base.training"))]
    flags = {"domain": str(world.letters), "out": str(world.runs / out)}
    return load_recipe("pretrain", None, [*own, *DENSE, *overrides], flags)


@pytest.fixture(scope="module")
def dense_base(world: World) -> Path:
    recipe = recipe_of(world, "dense-base", "evaluation.within_every_steps=15")
    assert recipe.default_base.training.steps == STEPS
    report = pretrain.run(recipe, QUIET)
    assert report.data["finished"]
    return world.runs / "dense-base"


def test_a_dense_base_learns_and_its_loss_is_measured_inside_training(dense_base: Path) -> None:
    ledger = Ledger.from_json(Run.open(dense_base, read_only=True).read_ledger())
    within = {row.step: row.nll_nats / row.bytes for row in ledger if row.split == "within"}
    assert sorted(within) == [15, 30, STEPS]
    assert within[15] > within[30] > within[STEPS]
    assert within[STEPS] < 2.5  # of 5.5 nats for a uniform guess


def test_measuring_inside_training_changes_no_bit_of_it(world: World, dense_base: Path) -> None:
    plain = pretrain.run(recipe_of(world, "dense-plain"), QUIET)
    watched, unwatched = (load_model(path) for path in (dense_base, Path(str(plain.data["model"]))))
    ours, theirs = watched.state_dict(), unwatched.state_dict()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_growing_a_dense_base_is_refused_in_one_line(world: World, dense_base: Path) -> None:
    with pytest.raises(InputError, match="a dense model has no experts to add to") as refused:
        grow.run(world.recipe("dense-grown", f"base={dense_base}"), QUIET)
    assert "\n" not in str(refused.value)
    assert "--method full" in str(refused.value)
    assert not (world.runs / "dense-grown").exists()


@pytest.mark.parametrize("method", ["full", "replay"])
def test_a_dense_base_is_trained_further_by_methods_that_need_no_experts(
    world: World, dense_base: Path, method: str
) -> None:
    report = grow.run(world.recipe(f"dense-{method}", f"base={dense_base}", f"method={method}"), QUIET)
    learned = report.data["learned"]
    assert isinstance(learned, dict)
    assert learned["digits"]["after"] < learned["digits"]["before"]
    model = load_model(str(report.data["model"]))
    assert isinstance(model, DenseTransformer)
    prompts = pad_left([[256, 49, 50], [256]], 257)
    rows = model.generate(*prompts, sampling=Sampling(max_new_tokens=8, stop_at_eos=False)).rows
    assert [len(row.tokens) for row in rows] == [8, 8]


def test_a_dense_model_is_described_by_its_own_parts(dense_base: Path) -> None:
    data = inspect.run(InspectRequest(str(dense_base)), QUIET).data
    params = data["params"]
    assert isinstance(params, dict)
    (base,) = params["by_generation"]
    assert set(base["parts"]) == {"embedding", "attention", "feedforward", "norms", "head"}
    assert base["total"] == params["total"] == sum(base["parts"].values())
