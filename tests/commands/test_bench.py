"""`mfext bench`: what scripts may rely on, and that nothing is timed where numbers are wrong."""

from __future__ import annotations

import json

import pytest
import torch

from mfext.cli import main
from mfext.commands import bench
from mfext.commands.rivals import CONFIG_S, dense_rival
from mfext.errors import InputError
from mfext.growth.plan import count_parameters
from mfext.metrics.speed import Figure, interleaved_ms
from mfext.requests import BenchRequest, Invocation
from mfext_kernels.checks import CheckResult


def test_as_json_it_is_one_object_with_targets_machine_blas_threads_and_commit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = torch.get_num_threads()
    assert main(["bench", "--size", "tiny", "--json", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["targets"]) == 7 and all(data[key] for key in ("machine", "blas", "timer", "mfext_version"))
    for each in data["targets"]:
        assert each["value"] > 0 and each["rule"] in ("at most", "at least")
        assert each["hit"] == (
            each["value"] <= each["target"] if each["rule"] == "at most" else each["value"] >= each["target"]
        )
        quotient = each["ours"] / each["other"]
        assert each["value"] == pytest.approx(quotient if each["rule"] == "at most" else 1 / quotient)
    for key in ("train_tokens_per_s", "decode_tokens_per_s", "peak_train_bytes"):
        assert data[key].keys() == {"ours", "dense_active", "dense_total"} and min(data[key].values()) > 0
    assert data["threads"] == 1 and torch.get_num_threads() == before
    assert data["commit"] is None or len(data["commit"]) == 12


def test_nothing_is_timed_where_a_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = CheckResult("expert_feedforward", False, 0.01, 1e-5, "expert_feedforward: worst in the output")
    monkeypatch.setattr(bench, "self_check", lambda: (wrong,))
    monkeypatch.setattr(bench, "interleaved_ms", lambda *_: pytest.fail("timed"))
    assert main(["bench", "--size", "tiny"]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "nothing was timed" in captured.err and "expert_feedforward" in captured.err


def test_another_device_and_an_unknown_size_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="bench times the CPU"):
        bench.run(BenchRequest(), Invocation(device="gpu"))
    assert main(["bench", "--size", "huge"]) == 2
    assert "one of small, tiny" in capsys.readouterr().err


def test_the_dense_rivals_have_as_many_parameters_as_they_are_said_to_have() -> None:
    ours = count_parameters(CONFIG_S)
    active, total = (count_parameters(dense_rival(CONFIG_S, size)) for size in ("active", "total"))
    assert active.active_per_token == pytest.approx(ours.active_per_token, rel=1e-3)
    assert total.total == pytest.approx(ours.total, rel=1e-3)


def test_a_figure_is_hit_on_the_right_side_of_its_target() -> None:
    def hit(ratio: float, rule: str) -> bool:
        return Figure(0, "", 1.0, 1.0, "ms", ratio, rule, 2.0).hit

    assert hit(2.0, "at most") and not hit(2.1, "at most") and hit(2.0, "at least") and not hit(1.9, "at least")


def test_both_are_run_in_turns_and_once_before() -> None:
    ran: list[str] = []
    interleaved_ms(lambda: ran.append("a"), lambda: ran.append("b"), 3, 2)
    assert "".join(ran) == "ab" + "ab" + "ab" + "a"
    ran.clear()
    interleaved_ms(lambda: ran.append("a"), lambda: ran.append("b"), 2, 1)
    assert "".join(ran) == "a" + "ab" + "a"
