"""`mfext doctor` tells the truth about kernels, packages and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfext.commands import doctor, kernel_check
from mfext.requests import DoctorRequest, Invocation


def test_every_kernel_agrees_with_its_reference() -> None:
    checks = kernel_check.check_kernels()
    assert {check.dtype for check in checks} == {"float32", "float64"}
    assert all(check.passed for check in checks), checks


def test_a_kernel_wrong_by_one_percent_in_one_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_check.expert_feedforward

    def wrong(*inputs: object, backend: str) -> torch.Tensor:
        result: torch.Tensor = right(*inputs, backend=backend)  # type: ignore[arg-type]
        factor = torch.ones_like(result)
        factor[3, 5] = 1.01 if backend == "cpu" else 1.0
        return result * factor

    monkeypatch.setattr(kernel_check, "expert_feedforward", wrong)
    failed = {check.name for check in kernel_check.check_kernels() if not check.passed}
    assert failed == {"expert feed-forward"}
    report = doctor.run(DoctorRequest(), Invocation())
    assert report.data["ok"] is False
    assert any("expert feed-forward" in alarm for alarm in report.alarms)


def test_the_answer_is_json_and_names_the_installed_versions() -> None:
    data = json.loads(json.dumps(doctor.run(DoctorRequest(), Invocation()).data))
    assert data["packages"]["torch"] == torch.__version__
    assert data["machine"]["cpus"] >= 1
    assert Path(data["folders"]["yaml"]).is_dir()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-package-here"))
    report = doctor.run(DoctorRequest(), Invocation())
    assert "no-such-package-here is not installed" in report.alarms


def test_a_stolen_lightning_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "2.6.2" if name == "lightning" else version(name))
    report = doctor.run(DoctorRequest(), Invocation())
    assert any("steals credentials" in alarm for alarm in report.alarms)


def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFEXT_CACHE", "/nowhere/to/be/written")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    report = doctor.run(DoctorRequest(), Invocation())
    assert any("set MFEXT_CACHE" in alarm for alarm in report.alarms)
