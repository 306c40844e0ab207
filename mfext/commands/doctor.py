"""`mfext doctor`: what is installed, what this machine offers, whether the kernels compute right, what is missing.

The answer is a block to paste into a bug report. It works where parts of the installation are broken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mfext import __version__
from mfext.paths import cache_folder, shipped_folder
from mfext.report.report import KeyValues, Report, Section, Table
from mfext.requests import DEFAULT_INVOCATION, DoctorRequest, Invocation

NEEDED = (
    "torch",
    "lightning",
    "hydra-core",
    "datasets",
    "torchmetrics",
    "rich",
    "safetensors",
    "tokenizers",
    "jinja2",
    "numpy",
)
OPTIONAL = {
    "triton": "GPU kernels",
    "tensorboard": "logger=tensorboard: pip install 'mfext[tensorboard]'",
    "wandb": "logger=wandb: pip install 'mfext[wandb]'",
    "torchao": "quantize --to int8: pip install 'mfext[quantize]'",
}
STOLEN = ("2.6.2", "2.6.3")


def run(request: DoctorRequest, invocation: Invocation = DEFAULT_INVOCATION) -> Report:
    """Look at the installation and the machine; never raises for what it finds."""
    packages = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    problems = [f"{name} is not installed" for name in NEEDED if packages[name] is None]
    if packages["lightning"] in STOLEN:
        problems.append(f"lightning {packages['lightning']} steals credentials (GHSA-w37p-236h-pfx3): remove it now")
    machine = _machine(problems)
    kernels = _kernels(problems, packages, machine)
    folders = _folders(problems)
    missing = {name: why for name, why in OPTIONAL.items() if packages[name] is None}
    data = {
        "packages": {"python": platform.python_version(), "mfext": __version__, **packages},
        "machine": machine,
        "folders": folders,
        "kernels": kernels,
        "missing_extras": missing,
        "problems": problems,
        "ok": not problems,
    }
    return Report(
        verb="doctor",
        data=data,
        title="mfext doctor",
        verdict=("Everything needed is here and the kernels compute what they should.",) if not problems else (),
        sections=_sections(data, missing),
        alarms=tuple(problems),
    )


def _sections(data: Mapping[str, object], missing: Mapping[str, str]) -> tuple[Section, ...]:
    packages, machine, folders = (_pairs(data[key]) for key in ("packages", "machine", "folders"))
    kernels = data["kernels"]
    assert isinstance(kernels, list)
    rows = tuple(
        (each["name"], f"{each['worst_relative_error']:.1e}", "right" if each["passed"] else "WRONG")
        for each in kernels
    )
    sections: list[Section] = [
        KeyValues("Versions", pairs=packages),
        KeyValues("Machine", pairs=machine),
        KeyValues("Folders", pairs=folders),
    ]
    if rows:
        columns = ("op", "largest relative error", "verdict")
        sections.append(Table("Kernels against their references", columns=columns, rows=rows, text_columns=columns))
    if missing:
        sections.append(KeyValues("Not installed, needed only for", pairs=tuple(missing.items())))
    return tuple(sections)


def _pairs(facts: object) -> tuple[tuple[str, str], ...]:
    assert isinstance(facts, Mapping)
    return tuple((str(key), "not installed" if value is None else str(value)) for key, value in facts.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(problems: list[str]) -> dict[str, object]:
    facts: dict[str, object] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
    }
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch does not load: {' '.join(str(error).split())[:200]}")
        return facts
    facts["threads"] = torch.get_num_threads()
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    facts["blas"] = "mkl" if has_mkl else "openblas or other"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts["gpus"] = ", ".join(gpus) or "none"
    facts["cuda"] = torch.version.cuda or "none"
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _folders(problems: list[str]) -> dict[str, object]:
    cache = cache_folder()
    existing = next((path for path in (cache, *cache.parents) if path.is_dir()), Path("/"))
    writable = os.access(existing, os.W_OK)
    if not writable:
        problems.append(f"the cache folder {cache} cannot be written: set MFEXT_CACHE to another")
    facts: dict[str, object] = {
        "package": Path(__file__).resolve().parent.parent,
        "python": sys.executable,
        "cache": cache,
        "cache_free_bytes": shutil.disk_usage(existing).free,
    }
    try:
        facts["yaml"] = shipped_folder("conf").parent
    except FileNotFoundError as error:
        problems.append(str(error))
    return {key: value if isinstance(value, int) else str(value) for key, value in facts.items()}


def _kernels(
    problems: list[str], packages: Mapping[str, str | None], machine: dict[str, object]
) -> list[dict[str, object]]:
    if packages["torch"] is None or any(text.startswith("torch does not load") for text in problems):
        return []
    from mfext_kernels import decode_step, gate_step, products
    from mfext_kernels.checks import self_check
    from mfext_kernels.grouped_linear import compiled as experts
    from mfext_kernels.routing import compiled as routing
    from mfext_kernels.stickbreaking import compiled as attention

    checks = self_check()
    machine["compiled_decode_step"] = decode_step.explain()
    machine["compiled_gate_step"] = gate_step.explain()
    machine["compiled_attention"] = attention.explain()
    machine["compiled_experts"] = experts.explain()
    machine["compiled_routing"] = routing.explain()
    machine["cpu_products"] = products.explain()
    problems += [f"wrong kernel: {check.detail}" for check in checks if not check.passed]
    return [asdict(check) for check in checks]
