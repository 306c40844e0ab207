"""`import mfext`: one sorted public surface, cheap to import, each name found where it is promised."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mfext

ROOT = Path(__file__).resolve().parent.parent


def test_importing_mfext_loads_nothing_else() -> None:
    code = "import sys, mfext; print(sorted(name for name in sys.modules if name.startswith(('mfext.', 'torch'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", mfext.__all__)
def test_every_public_name_loads_and_says_what_it_is_for(name: str) -> None:
    value = getattr(mfext, name)
    if name != "__version__":
        assert value.__doc__


def test_the_names_are_sorted_and_listed_once() -> None:
    assert sorted(mfext.__all__) == sorted(set(mfext.__all__))
    assert dir(mfext) == sorted(mfext.__all__)


def test_what_type_checkers_see_is_what_loads() -> None:
    tree = ast.parse((ROOT / "mfext" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == mfext._HOMES
    assert {*seen, "__version__"} == set(mfext.__all__)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="it has: ContinualModuleFormer"):
        mfext.grwo  # noqa: B018
