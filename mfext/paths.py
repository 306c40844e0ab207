"""Where things are: the YAML that ships with the package, and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal


def shipped_folder(name: Literal["conf", "recipes"]) -> Path:
    """The folder of shipped YAML: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(f"{name}/ is neither in {package} nor beside it: the installation is incomplete")


def cache_folder() -> Path:
    """Where prepared tokens and default bases are kept: $MFEXT_CACHE, else the user's cache folder. May not exist yet.

    $XDG_CACHE_HOME is followed; the default is ~/.cache/mfext.
    """
    chosen = os.environ.get("MFEXT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "mfext"
