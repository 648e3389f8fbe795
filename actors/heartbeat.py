"""Whether an actor still answers, asked from an event loop that may itself be held up."""

from __future__ import annotations

import asyncio
from typing import Any


class Silent(Exception):
    """An actor did not answer in time; in words."""


async def answer(call: Any, limit_s: float, key: str) -> Any:
    """What a quick call returns.

    Args:
        call: reference to its result.
        limit_s: longest wait, in seconds.
        key: of the configuration, where the limit comes from.

    Raises:
        Silent: it did not return.
        RayError: the actor is dead or out of reach, or what the call raised.
    """
    # Not wait_for: where this loop itself was held up, an answer that is there counts, however late.
    ping = asyncio.ensure_future(call)
    try:
        answered, _ = await asyncio.wait([ping], timeout=limit_s)
    finally:
        ping.cancel()
    if not answered:
        raise Silent(f"it did not answer for {limit_s:g} s ({key})")
    return ping.result()
