"""Kernels of mfext: routing bookkeeping, per-expert linear maps, stick-breaking attention.

Each op is a folder: `__init__` the contract, `reference` the plain version, `cpu` the fast one.
Imports torch only, never mfext.
"""
