"""The page of `make efficiency` says who wins and who loses, and draws every curve."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from kernels.bench.efficiency_page import to_markdown, to_svg

SPEEDS = {"train": 100.0, "evaluate": 300.0, "decode": 30.0, "decode_torch": 10.0}


def data(time_ratio: float | None) -> dict[str, Any]:
    reached = {"tokens": 2_000.0, "cpu_s": 20.0, "reason": None}
    never = {"tokens": None, "cpu_s": None, "reason": "never reached this loss (lowest: 1.5000 nats per byte)"}
    model = {"parameters": 10_000, "active_per_token": 5_000, "learning_rate": 3e-3, "final_loss": 1.5,
             "trained_wall_s": 60.0, "tokens_per_cpu_s": SPEEDS}  # fmt: skip
    return {
        "reference": "ours",
        "tokens": 4_000,
        "domain": "prose",
        "seed": 1,
        "models": {"ours": model, "other": model | {"tokens_per_cpu_s": {key: 60.0 for key in SPEEDS}}},
        "curves": [
            {"name": name, "tokens": [1_000, 2_000, 4_000], "cpu_s": [10, 20, 40], "loss": [3.0, 2.0, 1.5]}
            for name in ("ours", "other")
        ],
        "levels": [
            {
                "loss": 2.0,
                "reached": {"ours": reached, "other": reached if time_ratio else never},
                "token_ratio": {"ours": 1.0, "other": 1.25 if time_ratio else None},
                "time_ratio": {"ours": 1.0, "other": time_ratio},
            }
        ],
        "inference_at_equal_loss": {
            "evaluate": {"dense_over_reference": 1.75, "reason": None},
            "decode": {"dense_over_reference": None, "reason": "no dense model is as good"},
        },
        "surroundings": {"date": "2026-11-25T00:00:00", "commit": "abc", "processor": "a processor",
                         "cpu_capability": "AVX512", "torch": "2.13.0"},
    }  # fmt: skip


@pytest.mark.parametrize(("time_ratio", "said"), [(1.5, "`ours` wins in time"), (0.5, "`ours` loses in time")])
def test_the_verdict_says_who_wins_and_who_loses(time_ratio: float, said: str) -> None:
    page = to_markdown(data(time_ratio))
    assert said in page
    assert f"1.25 times the tokens and {time_ratio:.2f} times the CPU time" in page
    assert "5.00 (evaluation forward), 0.50 (cached decoding" in page
    assert "its time a token over that of `ours`: 1.75 (evaluation forward)." in page
    assert "no dense model is as good" in page


def test_a_level_never_reached_is_said_and_not_counted() -> None:
    page = to_markdown(data(None))
    assert "`other` never reached 2.885 bits per byte: its lowest is 2.164." in page
    assert "| 2.885 | 2 k tokens (1.00), 20.0 s (1.00) | never |" in page
    assert "wins" not in page
    assert "loses" not in page


def test_the_picture_is_well_formed_and_holds_every_curve_over_tokens_and_over_time() -> None:
    root = ElementTree.fromstring(to_svg(data(1.0)))
    lines = [each for each in root.iter() if each.tag.endswith("polyline")]
    assert len(lines) == 4
    assert all(len(line.attrib["points"].split()) == 3 for line in lines)
