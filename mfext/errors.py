"""Every failure a user can meet, in one tree.

    MfextError
    ├── InputError        exit 2   a flag, key, file or folder that cannot be used as given
    │   ├── DamagedError  exit 2   a folder whose content is not what its manifest says
    │   └── LockedError   exit 2   a run another process is writing
    ├── DivergedError     exit 3   training met non-finite numbers too often in a row
    ├── MachineError      exit 4   the machine refused: disk, permission, memory
    ├── BudgetError       exit 5   `check` found a run over its budget
    ├── FailedTrial       exit of the first failed trial of a sweep; the others were run all the same
    └── InterruptedRun    exit 130 / 143   stopped by SIGINT / SIGTERM after committing

Anything else that escapes is our own bug (exit 1).
"""


class MfextError(Exception):
    """A failure with one clear line: what went wrong, where, and why or what to do."""

    exit_code = 1

    def __init__(self, what: str, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        parts = (part for part in (what, self.where, fix) if part)
        super().__init__(" ".join(": ".join(parts).split()))


class InputError(MfextError):
    """Bad input: a flag, key, value, file or folder that cannot be used as given."""

    exit_code = 2


class DamagedError(InputError):
    """A committed folder whose content does not match its manifest."""


class LockedError(InputError):
    """A run folder that another process holds."""


class DivergedError(MfextError):
    """Training stopped because losses or gradients were non-finite too often in a row."""

    exit_code = 3


class MachineError(MfextError):
    """The machine refused: no space, no permission, not enough memory."""

    exit_code = 4


class BudgetError(MfextError):
    """A checked run is over its budget."""

    exit_code = 5


class FailedTrial(MfextError):
    """Some trials of a sweep failed; the exit code is that of the first of them."""

    def __init__(self, exit_code: int, what: str, where: object = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.exit_code = exit_code


class InterruptedRun(MfextError):
    """A signal stopped the run after its progress was committed."""

    exit_code = 130

    def __init__(self, signal_number: int, what: str, where: object = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.exit_code = 128 + signal_number
