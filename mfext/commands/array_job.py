"""A sweep as an array job: a script in which each task runs one trial by its number.

Hydra's launchers for SLURM and Ray are not used: docs/sweeps.md says why.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mfext.report.report import KeyValues, Report
from mfext.requests import Invocation
from mfext.store_sweep import Sweep

SCRIPT_NAME = "submit.sh"
# SIGTERM this long before the time limit: the trial commits and leaves, and the next submission goes on from there.
WARNING_S = 120

_TEMPLATE = """\
#!/bin/bash
# One task for each trial without a result. Options given to sbatch win over these: sbatch --time=4:00:00 {script}
#SBATCH --job-name=mfext-{verb}
#SBATCH --array={array}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={threads}
#SBATCH --signal=B:TERM@{warning_s}
#SBATCH --requeue
#SBATCH --output=/dev/null
set -eu
exec >> {sweep}/logs/task-"$SLURM_ARRAY_TASK_ID".log 2>&1
cd {folder}
threads="${{SLURM_CPUS_PER_TASK:-{threads}}}"
exec {python} -m mfext trial {sweep} --number "$SLURM_ARRAY_TASK_ID" --threads "$threads"{flags}
"""


def write_array_job(sweep: Sweep, numbers: Sequence[int], invocation: Invocation) -> Report:
    """Write SWEEP/submit.sh for the trials of these numbers; what to do with it."""
    data: dict[str, object] = {"sweep": str(sweep.path), "verb": sweep.plan.verb, "tasks": list(numbers)}
    title = f"mfext {sweep.plan.verb} sweep as an array job"
    if not numbers:
        return Report(sweep.plan.verb, {**data, "script": None}, title, ("every trial is done; nothing to submit",))
    path = sweep.write_file(SCRIPT_NAME, array_job_script(sweep, numbers, invocation))
    steps = (
        ("submit", f"sbatch {shlex.quote(str(path))}"),
        ("one task here", f"SLURM_ARRAY_TASK_ID={numbers[0]} bash {shlex.quote(str(path))}"),
        ("tables and report", f"mfext report {shlex.quote(str(sweep.path))}"),
    )
    verdict = (f"{len(numbers)} trials are planned; none was run",)
    return Report(
        sweep.plan.verb, {**data, "script": str(path)}, title, verdict, (KeyValues("What to do", pairs=steps),)
    )


def array_job_script(sweep: Sweep, numbers: Sequence[int], invocation: Invocation) -> str:
    """The job script; paths are quoted for the shell and appear in no #SBATCH line, where quoting differs."""
    return _TEMPLATE.format(
        script=SCRIPT_NAME,
        verb=sweep.plan.verb,
        array=ranges(numbers),
        threads=invocation.threads or 1,
        warning_s=WARNING_S,
        folder=shlex.quote(str(Path.cwd())),
        sweep=shlex.quote(str(sweep.path)),
        python=shlex.quote(sys.executable),
        flags=" --debug" if invocation.debug else "",
    )


def ranges(numbers: Sequence[int]) -> str:
    """'0-3,5' for 0, 1, 2, 3, 5, as sbatch's --array takes it."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
