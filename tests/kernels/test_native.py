"""Compiled code builds where there is a compiler. Elsewhere its tests are skipped; a broken file must not look so."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import mfext_kernels
from mfext_kernels import decode_step, gate_step
from mfext_kernels.grouped_linear import compiled as experts
from mfext_kernels.native import Source
from mfext_kernels.routing import compiled as routing
from mfext_kernels.stickbreaking import compiled as attention

SOURCES = [each.SOURCE for each in (attention, decode_step, experts, gate_step, routing)]


def test_these_are_all_there_are() -> None:
    assert {source.path for source in SOURCES} == set(Path(mfext_kernels.__file__).parent.glob("**/*.c"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path.stem)
def test_it_builds_where_there_is_a_compiler(source: Source) -> None:
    assert source.available(), source.explain()
