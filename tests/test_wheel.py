"""The wheel, built from the source distribution, works from any directory with its YAML inside."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def quietly(words: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from it, without network."""
    folder = tmp_path_factory.mktemp("dist")
    quietly([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked by pip into a folder of its own; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    quietly([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(wheel)], folder)
    return folder


def test_the_wheel_holds_both_packages_and_all_yaml(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in (("mfext", "mfext"), ("kernels/mfext_kernels", "mfext_kernels")):
        for path in (ROOT / folder).glob("**/*.py"):
            assert f"{place}/{path.relative_to(ROOT / folder)}" in names
    for folder in ("conf", "recipes"):
        for path in (ROOT / folder).glob("**/*.yaml"):
            assert f"mfext/{path.relative_to(ROOT)}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mfext", "mfext_kernels"}
    assert "mfext/py.typed" in names


def test_the_source_distribution_holds_the_tests(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt", "tests/conftest.py"} <= names


def test_the_installed_command_works_from_any_directory(installed: Path, tmp_path: Path) -> None:
    code = (
        "import mfext, mfext_kernels, mfext.recipe as r\n"
        "from mfext.paths import shipped_folder\n"
        "print(mfext.__file__, mfext_kernels.__file__, shipped_folder('conf'), sep='\\n')\n"
        "r.load_recipe('grow', None, ['growth=compete'])\n"
        "assert 'code' in r.known_domains()\n"
    )
    lines = quietly([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).split()
    assert all(line.startswith(str(installed)) for line in lines)
    out = quietly([sys.executable, "-m", "mfext", "--help"], tmp_path, PYTHONPATH=str(installed))
    assert out.startswith("usage: mfext VERB")


def test_the_version_is_the_packages(built: Path) -> None:
    import mfext

    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"mfext-{mfext.__version__}-py3-none-any")
