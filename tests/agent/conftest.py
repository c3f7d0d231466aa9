"""Fixtures of the agent's tests: one agent for a file of tests, a client for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.agent import Guest, RunningAgent, connected, make_rootfs, missing, running_agent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("image") / "rootfs")


@pytest.fixture(scope="module")
def agent() -> Iterator[RunningAgent]:
    if lacking := missing():
        pytest.skip(f"the real agent needs {lacking}")
    with running_agent() as running:
        yield running


@pytest.fixture
async def guest(agent: RunningAgent, rootfs: Path) -> AsyncIterator[Guest]:
    async with connected(agent, rootfs) as connection:
        yield connection
