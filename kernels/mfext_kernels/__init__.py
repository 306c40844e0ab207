"""Kernels of mfext: routing bookkeeping, per-expert linear maps, stick-breaking attention, head with cross-entropy.

Each op is a folder: `__init__` the contract, `reference` the plain version, `cpu` the fast one, `triton` the GPU's.
Imports torch only (and triton, at the first call that takes it), never mfext.
`self_check()` compares every fast version on the CPU with its reference.
"""

from __future__ import annotations

from mfext_kernels.checks import CheckResult, self_check

__all__ = ["CheckResult", "self_check"]
