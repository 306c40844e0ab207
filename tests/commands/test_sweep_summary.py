"""Trials that differ only in their seed are one setting, and its numbers those of metrics/seeds.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mfext.commands.sweep_summary import settings_of, with_groups
from mfext.metrics.seeds import mean_over_seeds, ratio_over_seeds
from tests.report.stream_results import STREAM, fail, sweep_data


def groups(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    made: Any = with_groups(data)
    return {group["name"]: group for group in made["groups"]}


def forgetting(data: dict[str, Any], method: str) -> dict[int, float]:
    return {
        trial["overrides"]["seed"]: trial["data"]["forgetting"]["mean"]["difference"]
        for trial in data["trials"]
        if trial["overrides"]["method"] == method and trial["data"]
    }


def test_means_and_ratios_are_those_over_the_seeds_both_ran() -> None:
    data = sweep_data(("grow", "replay", "full"))
    fail(data, 4, "diverged")
    made = groups(data)
    grow, replay = forgetting(data, "grow"), forgetting(data, "replay")
    assert made["grow"]["forgetting"].items() >= mean_over_seeds(grow).to_json().items()
    assert made["grow"]["forgetting_to"]["replay"] == ratio_over_seeds(grow, replay).to_json()
    assert made["grow"]["forgetting_to"]["replay"]["seeds"] == [1, 3]
    assert made["replay"]["num_done"] == 2 and made["replay"]["num_trials"] == 3


def test_learning_against_full_is_a_share_of_its_loss() -> None:
    data = sweep_data(("grow", "full"))
    for trial in data["trials"]:
        trial["data"]["learned"]["python_code"]["after"] = 2.06 if trial["overrides"]["method"] == "grow" else 2.0
    gap = groups(data)["grow"]["learning_to"]["full"]["python_code"]
    assert gap["estimate"] == pytest.approx(0.03) and gap["low"] == pytest.approx(0.03, abs=1e-6)


def test_settings_are_named_by_method_and_what_else_was_varied() -> None:
    data = sweep_data(("grow", "full"), seeds=(1, 2))
    for trial in data["trials"]:
        trial["overrides"]["growth.mode"] = "side"
    assert [setting.name for setting in settings_of(data)] == ["grow growth.mode=side", "full growth.mode=side"]
    for trial in data["trials"]:
        trial["overrides"] = {"seed": trial["overrides"]["seed"]}
        trial["data"]["method"] = "grow"
    assert [setting.name for setting in settings_of(data)] == ["grow"]


def test_only_references_that_have_results_are_references() -> None:
    data = sweep_data(("grow", "replay", "full"), seeds=(1,))
    fail(data, 1, "diverged")
    assert with_groups(data)["references"] == ["full"]


def test_an_undefined_number_keeps_the_runs_reason() -> None:
    data = sweep_data(("joint",))
    for trial in data["trials"]:
        trial["data"]["forgetting"]["mean"] = {
            **dict.fromkeys(("difference", "low", "high")),
            "reason": "no domain to compare",
        }
    found = groups(data)["joint"]["forgetting"]
    assert found["estimate"] is None and found["reason"] == "no domain to compare"


def test_the_mean_matrix_is_the_mean_cell_by_cell_and_never_of_fewer_seeds() -> None:
    data = sweep_data(("grow",))
    matrices = [trial["data"]["matrix"]["nll_per_byte"] for trial in data["trials"]]
    matrices[1][2][3] = None
    mean = groups(data)["grow"]["matrix"]["nll_per_byte"]
    assert mean[4][0] == pytest.approx(math.fsum(matrix[4][0] for matrix in matrices) / 3)
    assert mean[2][3] is None


def test_cost_is_that_of_all_stages_that_were_trained() -> None:
    made = groups(sweep_data(("grow",)))["grow"]
    assert made["tokens"] == 6_000_000 + 3 * 1_200_000 and made["wall_s"] == 812 + 3 * 231
    assert made["tokens_per_s"] == pytest.approx(made["tokens"] / made["wall_s"])
    assert {name: each["stage"] for name, each in made["learned"].items()} == dict(
        zip(STREAM, range(1, 5), strict=True)
    )


def test_domains_stand_in_the_streams_order_however_the_results_were_written() -> None:
    data = sweep_data(("grow",))
    for trial in data["trials"]:
        trial["data"]["learned"] = dict(sorted(trial["data"]["learned"].items()))
    assert list(groups(data)["grow"]["learned"]) == list(STREAM)
