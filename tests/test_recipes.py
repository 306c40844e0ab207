"""Every YAML file that ships composes into a valid Recipe, and every recipe's header keeps its promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mfext.config import Recipe
from mfext.errors import InputError
from mfext.recipe import (
    GROUPS,
    config_hash,
    expand_sweep,
    known_domains,
    known_options,
    known_recipes,
    load_recipe,
    read_yaml,
    recipe_from_mapping,
    recipe_to_mapping,
)

ROOT = Path(__file__).resolve().parent.parent


def verb_of(name: str) -> str:
    if name.startswith(("stream", "orders")):
        return "continual"
    if name.startswith(("prune", "specialise")):
        return "prune"
    return "pretrain" if name.startswith(("pretrain", "efficiency")) else "grow"


def load_anywhere(name: str, *overrides: str) -> Recipe:
    """Load a recipe whose corpora may be absent here, by naming an embedded domain in their place."""
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    embedded = {"domain": "code", "bystanders": [], "default_base.domains": ["prose"]} if "../" in text else {}
    if verb_of(name) not in ("grow", "prune"):  # Its domain, or the first of its stream, is the base's.
        embedded.pop("default_base.domains", None)
    if embedded and verb_of(name) == "continual":
        embedded["domains"] = ["prose", "code"]
    return load_recipe(verb_of(name), name, list(overrides), embedded)


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_composes(name: str) -> None:
    recipe = load_anywhere(name)
    assert recipe.training.steps > 0
    assert recipe.default_base.training.steps > 0


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_states_hardware_time_and_expected_numbers(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    header = text[: text.index("defaults:")]
    for word, rule in (("hardware", r"\d+ CPU|GPU"), ("time", r"\d+ minute|\d+ hour"), ("expected", r"\d")):
        found = re.search(rf"^# {word}:\s+(.+(?:\n#\s{{6,}}.+)*)", header, re.M)
        assert found, f"{name}: no '# {word}:' in the header"
        assert re.search(rule, found.group(1)), f"{name}: {word} names no number"
    assert f"mfext {verb_of(name)}" in header


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_options_and_each_composes(group: str) -> None:
    options = known_options(group)
    assert options
    for option in options:
        base = "pretrain_small" if group == "model" else "grow_code"
        load_anywhere(base, f"{group}={option}")


def test_every_domain_file_is_plain_yaml_with_its_own_name() -> None:
    domains = known_domains()
    assert {"code", "prose", "unicode_names", "bytecode"} <= set(domains)
    assert all(settings["name"] == name for name, settings in domains.items())


def test_a_recipe_survives_json() -> None:
    recipe = load_recipe("grow", None, ["growth.layers=[0,1]"])
    assert recipe.growth.layers == (0, 1)
    again = recipe_from_mapping(json.loads(json.dumps(recipe_to_mapping(recipe))))
    assert again == recipe
    assert config_hash(again) == config_hash(recipe)


def test_the_hash_ignores_where_results_go_and_sees_what_decides_them() -> None:
    first = load_recipe("grow", None, [])
    assert config_hash(load_recipe("grow", None, ["out=elsewhere", "logger=tensorboard"])) == config_hash(first)
    assert config_hash(load_recipe("grow", None, ["seed=2"])) != config_hash(first)


def test_single_keys_absent_from_the_yaml_can_be_set() -> None:
    recipe = load_recipe("grow", None, ["training.commit_every_s=5", "growth.gate.ramp=0.3", "training.tokens=1e6"])
    assert recipe.training.commit_every_s == 5.0
    assert recipe.growth.gate.ramp == 0.3
    assert recipe.training.tokens == 1_000_000


def test_groups_change_many_keys_at_once() -> None:
    recipe = load_recipe("grow", None, ["growth=compete", "method=full", "trainer=ddp"])
    assert (recipe.growth.mode, recipe.method, recipe.trainer.strategy) == ("compete", "full", "ddp")
    assert recipe.growth.embedding_rank == 0
    assert recipe.training.learning_rate == 4e-3


def test_flags_win_over_overrides_and_may_hold_any_text(tmp_path: Path) -> None:
    folder = tmp_path / "my, 'odd' domain = \\"
    folder.mkdir()
    recipe = load_recipe("grow", None, ["domain=code"], {"domain": str(folder)})
    assert recipe.domain == str(folder)


def test_pretrain_speaks_of_its_base() -> None:
    recipe = load_recipe("pretrain", None, ["training.tokens=500_000", "model=tiny"], {"domain": "prose,code"})
    assert recipe.default_base.domains == ("prose", "code")
    assert recipe.default_base.training.tokens == recipe.training.tokens == 500_000
    assert recipe.default_base.model.d_model == 32


def test_a_users_own_file_may_use_the_shipped_groups(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - growth: compete\n  - _self_\ndomain: code\ntraining:\n  tokens: 8192\n")
    recipe = load_recipe("grow", str(path), ["model=tiny"])
    assert (recipe.growth.mode, recipe.training.tokens, recipe.default_base.model.d_model) == ("compete", 8192, 32)


def test_interpolations_name_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training:\n  tokens: 8192\nseed: ${training.tokens}\n")
    assert load_recipe("grow", str(path), []).seed == 8192


def test_yaml_beside_a_users_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "growth").mkdir()
    (tmp_path / "growth" / "evil.yaml").write_text("mode: gated\n")
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - growth: evil\n")
    with pytest.raises(InputError, match="no growth 'evil'"):
        load_recipe("grow", str(path), [])


def test_a_package_comment_in_a_users_file_reaches_nothing_of_hydras(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# @package hydra\nrun:\n  dir: elsewhere\n")
    with pytest.raises(InputError, match="unknown key 'run'"):
        load_recipe("grow", str(path), [])


def test_reading_plain_yaml_gives_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: [x, 2.5, null, true]\n")
    assert read_yaml(path) == {"a": 1, "b": ["x", 2.5, None, True]}


def test_sweeps_expand_to_every_combination() -> None:
    combinations = {tuple(each) for each in expand_sweep(["growth=gated,compete", "seed=1,2"])}
    assert combinations == {(f"growth={mode}", f"seed={seed}") for mode in ("gated", "compete") for seed in (1, 2)}
