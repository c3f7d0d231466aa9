"""What a guest does once before it is saved, so that no copy of it is the first to do it."""

from __future__ import annotations

import logging
import secrets
import time

from vc.agent_client.client import AgentClient

log = logging.getLogger(__name__)


async def warm_up(agent: AgentClient) -> None:
    """Call what every restored guest is asked. Raises: VCError."""
    await agent.reseed_random(secrets.token_bytes(512))
    now = time.time_ns() // 1000
    await agent.set_clock(now // 1_000_000, now % 1_000_000)
