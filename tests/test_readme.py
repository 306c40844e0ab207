"""README's commands, picture and links are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mfext.cli import parse_arguments
from mfext.recipe import check_domain, expand_sweep, load_recipe
from mfext.verbs import find_verb

README = Path(__file__).resolve().parent.parent / "README.md"
CODE = re.compile(r"^    (.+)$", re.MULTILINE)
# Folders a reader puts in place of these words.
PLACEHOLDERS = {"path/to/folder", "RUN"}


def commands(start: str) -> list[str]:
    lines = (line.split("  #")[0].strip() for line in CODE.findall(README.read_text(encoding="utf-8")))
    return sorted({line for line in lines if line.startswith(start)})


def test_readme_shows_the_two_commands() -> None:
    shown = commands("make ")
    assert {"make demo", "make test"} <= set(shown)
    targets = set(re.findall(r"^([a-z]+):", (README.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {line.split()[1] for line in shown} <= targets


@pytest.mark.parametrize("line", commands("mfext "))
def test_every_command_in_readme_is_understood(line: str) -> None:
    _, name, *words = shlex.split(line)
    verb = find_verb(name)
    assert verb is not None
    arguments = parse_arguments(verb, words)
    arguments.take("invocation.")
    domain = arguments.values.get("domain")
    if domain in PLACEHOLDERS:
        arguments.values["domain"] = "bytecode"
    elif isinstance(domain, str):
        for each in domain.split(","):
            check_domain(each)
    if verb.takes == "recipe" and "base" not in arguments.values:
        recipe_name = arguments.values.pop("recipe", None)
        sweep = arguments.values.pop("multirun", False)
        for overrides in expand_sweep(arguments.overrides) if sweep else [arguments.overrides]:
            if recipe_name != "corpora_grow":
                load_recipe(verb.name, recipe_name, overrides, arguments.values)


def test_every_link_and_picture_in_readme_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README.read_text(encoding="utf-8"))
    local = [first or second for first, second in links if not (first or second).startswith("http")]
    assert local, "README links to the project's own files"
    missing = [link for link in local if not (README.parent / link).exists()]
    assert not missing


def test_readme_names_only_files_that_exist() -> None:
    rooms = re.findall(
        r"^    ((?:mfext|kernels|conf|recipes|tests|docs)/[\w/.]*)", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    missing = [room for room in rooms if not (README.parent / room).exists()]
    assert rooms and not missing
