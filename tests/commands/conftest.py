"""One tiny world and its first run, for all the stories told of them."""

from __future__ import annotations

import pytest

from mfext.report.report import Report
from tests.commands.tiny_world import QUIET, World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def grown(world: World) -> Report:
    """The first run: letters are the base, digits are learned. Nobody disturbs it."""
    from mfext.commands import grow

    return grow.run(world.recipe("first"), QUIET)
