"""Fixtures of the agent's tests: a client for each test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness.agent import Guest, connected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.harness.agent import RunningAgent


@pytest.fixture
async def guest(agent: RunningAgent, rootfs: Path) -> AsyncIterator[Guest]:
    async with connected(agent, rootfs) as connection:
        yield connection
