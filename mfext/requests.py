"""What the small verbs are asked to do, and how every verb is asked to behave.

A verb that trains takes a Recipe (config.py); the others take one of the requests below. Each command is
`run(request, invocation) -> Report`. Checks as in config.py: ValueError naming the key, the value and the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from mfext.config_checks import require_choices
from mfext.config_evaluation import EvaluationConfig
from mfext.config_switching import SwitchConfig


@dataclass(frozen=True)
class Invocation:
    """How to run, never what to compute.

    `device` is "cpu", "gpu" or None (the best there is); `threads` None leaves torch's own choice; `resume` is the
    folder of an interrupted run to continue exactly. Of a sweep, `jobs` is how many trials run at a time, `array_job`
    the batch system to write a job script for instead of running them.
    """

    json: bool = False
    quiet: bool = False
    verbosity: int = 0
    dry_run: bool = False
    debug: bool = False
    device: str | None = None
    threads: int | None = None
    resume: str | None = None
    jobs: int = 1
    array_job: str | None = None

    def __post_init__(self) -> None:
        if self.device not in (None, "auto", "cpu", "gpu"):
            raise ValueError(f"device={self.device!r}: must be cpu, gpu or auto")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads!r}: must be at least 1")
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs!r}: must be at least 1")
        if self.array_job not in (None, "slurm"):
            raise ValueError(f"array_job={self.array_job!r}: must be slurm")


DEFAULT_INVOCATION = Invocation()
"""How a verb runs where nobody says: the default of every command's `run`."""


@dataclass(frozen=True)
class EvalRequest:
    """Losses and expert usage of a model on domains. `tokenizer` None takes the one named in the model folder.

    `switch` asks for documents that change domain on the way, and for short ones; it needs two domains.
    """

    model: str
    domains: tuple[str, ...]
    tokenizer: str | None = None
    seed: int = 1
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    switch: SwitchConfig = field(default_factory=SwitchConfig)

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("domains=(): must be at least one name, folder or hf:owner/name")
        if self.switch.on and len(set(self.domains)) < 2:
            raise ValueError(f"domains={self.domains!r}: must be at least two to switch between them")
        if not self.switch.on and self.switch != SwitchConfig():
            raise ValueError(f"switch={self.switch!r}: needs --switch")


@dataclass(frozen=True)
class RestoreRequest:
    """The pruning run whose removed experts go back, into its own pruned model or, `model`, one grown from it since."""

    run: str
    out: str
    model: str | None = None
    seed: int = 1


@dataclass(frozen=True)
class QuantizeRequest:
    """Store a model's matrices as `to` in the folder `out`, or the first free one under runs/.

    What that costs is measured on `domains`. `tokenizer` None takes the one named in the model folder.
    """

    model: str
    to: Literal["int8", "bf16"]
    domains: tuple[str, ...] = ()
    out: str | None = None
    tokenizer: str | None = None
    seed: int = 1
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require_choices(self)


@dataclass(frozen=True)
class InspectRequest:
    """Layers, generations, lineage and sizes of a model or run folder; with `domains` what its experts do there.

    `out` is an HTML file to write. `tokenizer` None takes the one named in the model folder.
    """

    model: str
    domains: tuple[str, ...] = ()
    out: str | None = None
    tokenizer: str | None = None
    seed: int = 1
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.out is not None and not self.out.endswith(".html"):
            raise ValueError(f"out={self.out!r}: must end in .html")


@dataclass(frozen=True)
class GenerateRequest:
    """Text from a model. Temperature 0 is greedy; `top_k` and `top_p` None leave the distribution whole."""

    model: str
    prompts: tuple[str, ...] = ("",)
    tokenizer: str | None = None
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature!r}: must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k!r}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: must be above 0, at most 1")


@dataclass(frozen=True)
class ReportRequest:
    """Rebuild report.html, report.md and metrics.json of a run or a sweep from its raw ledger.

    `format` csv or latex writes every table to tables/ as well.
    """

    run: str
    format: str | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.format not in (None, "csv", "latex"):
            raise ValueError(f"format={self.format!r}: must be csv or latex")


@dataclass(frozen=True)
class CompareRequest:
    """The last stages of two runs, paired per document; `seed` draws the bootstrap. `out` is an HTML file to write."""

    run_a: str
    run_b: str
    out: str | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.out is not None and not self.out.endswith(".html"):
            raise ValueError(f"out={self.out!r}: must end in .html")


@dataclass(frozen=True)
class CheckRequest:
    """Budgets of a run in bits per byte; None leaves one unchecked.

    `max_forgetting` bounds the mean rise on old domains, `min_learned` the least fall on a domain learned,
    `max_bystander` the greatest rise on a domain never trained. `strict` holds the bad end of the 95 % interval to it.
    """

    run: str
    max_forgetting: float | None = None
    min_learned: float | None = None
    max_bystander: float | None = None
    strict: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        for key in ("max_forgetting", "min_learned", "max_bystander"):
            budget = getattr(self, key)
            if budget is not None and not math.isfinite(budget):
                raise ValueError(f"{key}={budget!r}: must be a finite number of bits per byte")


@dataclass(frozen=True)
class TrialRequest:
    """Run one trial of the sweep in the folder `run`, by its number from 0.

    With `follow` it stops as SIGTERM does once that process, which must have started this one, is gone.
    """

    run: str
    number: int
    follow: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number={self.number!r}: must be 0 or more")


@dataclass(frozen=True)
class BenchRequest:
    """This machine's speed and memory. `size` tiny only shows that it works: its ratios say nothing."""

    size: Literal["small", "tiny"] = "small"
    seed: int = 1

    def __post_init__(self) -> None:
        require_choices(self)


@dataclass(frozen=True)
class DoctorRequest:
    """Versions, devices, kernel self-check, what is missing."""

    seed: int = 1
