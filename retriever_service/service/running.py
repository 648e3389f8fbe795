"""The process around an application: it serves until SIGTERM or SIGINT, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Protocol

import uvicorn
import uvloop
from starlette.types import ASGIApp

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2_048
_KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that it is they who close them."""
_CLOSING_S = 2
"""For connections to take their last answers, once all are given."""


class Drainable(Protocol):
    """What an application serves; its lifespan starts and closes it."""

    failed: asyncio.Event
    """Set when it cannot be served any more."""
    failure: Exception | None
    """Why; set before `failed`."""

    async def drain(self) -> bool:
        """Take nothing new, answer the rest; whether it came to rest within its grace period. May be called again."""
        ...


def run(
    app: ASGIApp,
    service: Drainable,
    listener: socket.socket,
    on_hangup: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or the failure of what is served; call it in the main thread.

    If the service has not come to rest by the end of its grace period, the process ends here, with status 0: what it
    was doing has been acknowledged to nobody.

    Args:
        on_hangup: called at SIGHUP; None leaves that signal as it is.

    Raises:
        Whatever is the service's `failure`.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        at_rest = runner.run(_serve(app, service, listener, on_hangup))
        if not at_rest:
            logger.warning("something was still being done after the grace period")
            logging.shutdown()
            os._exit(0)


@contextlib.asynccontextmanager
async def stopping() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set, within the block, in place of what they do otherwise."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number, action in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, action)


async def _serve(
    app: ASGIApp, service: Drainable, listener: socket.socket, on_hangup: Callable[[], None] | None
) -> bool:
    """Returns whether the service has come to rest."""
    server = _Server(
        uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSING_S,
        )
    )
    if on_hangup is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)
    async with stopping() as stop:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ends = [asyncio.create_task(event.wait()) for event in (stop, service.failed)]
        await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
        at_rest = await service.drain()
        server.should_exit = True
        await serving
        for end in ends:
            end.cancel()
    if service.failure is not None:
        raise service.failure
    return at_rest


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`: uvicorn would raise them again at its end, and the exit status be theirs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
