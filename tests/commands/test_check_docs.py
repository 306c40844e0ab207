"""The CI snippets of docs/check.md: their commands parse, and the shell script ends as it says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from mfext.cli import parse_arguments
from mfext.verbs import find_verb

TEXT = (Path(__file__).parents[2] / "docs" / "check.md").read_text()


def snippet(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", TEXT, re.S)
    assert found is not None
    return found.group(1)


def test_every_command_shown_is_one_that_mfext_takes() -> None:
    commands = re.findall(r"^[\s`]*(?:run: )?mfext (\w+) ([^`\n|]*)", TEXT, re.M)
    assert {verb for verb, _ in commands} >= {"check", "compare", "grow"}
    for name, rest in commands:
        verb = find_verb(name)
        assert verb is not None
        parse_arguments(verb, rest.replace('"', "").split())


def test_the_workflow_is_yaml_with_steps() -> None:
    workflow = yaml.safe_load(snippet("yaml"))
    steps = workflow["jobs"]["check"]["steps"]
    assert any("mfext check" in step.get("run", "") for step in steps)


@pytest.mark.parametrize(("found", "ends"), [(0, 0), (5, 1), (2, 2)])
def test_the_shell_script_passes_on_what_check_says(found: int, ends: int, tmp_path: Path) -> None:
    stand_in = tmp_path / "mfext"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = check ] && exit {found}\nexit 0\n')
    stand_in.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ["sh", "-c", snippet("sh")]
    assert subprocess.run(script, env={"PATH": path}, check=False, capture_output=True).returncode == ends
