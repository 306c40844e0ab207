"""`mfext doctor` tells the truth about kernels, packages and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfext.commands import doctor
from mfext.requests import DoctorRequest, Invocation
from mfext_kernels import checks, products


def test_a_sound_installation_is_called_sound() -> None:
    report = doctor.run(DoctorRequest(), Invocation())
    assert report.data["ok"] is True
    assert report.verdict and not report.alarms
    assert report.data["kernels"]


def test_a_wrong_kernel_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = checks.CheckResult("expert_feedforward", False, 0.01, 1e-5, "expert_feedforward: worst in the output")
    monkeypatch.setattr(checks, "self_check", lambda: (wrong,))
    report = doctor.run(DoctorRequest(), Invocation())
    assert report.data["ok"] is False
    assert report.alarms == ("wrong kernel: expert_feedforward: worst in the output",)


def test_the_answer_is_json_and_names_the_installed_versions() -> None:
    data = json.loads(json.dumps(doctor.run(DoctorRequest(), Invocation()).data))
    assert data["packages"]["torch"] == torch.__version__
    assert data["machine"]["cpus"] >= 1
    assert data["machine"]["cpu_products"] == products.explain()
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
