"""A closed-loop load on a Search-R1 route: so many clients, each with one request in flight at any time.

Written on asyncio's protocols, because a general HTTP client costs more per request than the server that is measured.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import cast
from urllib.parse import urlsplit

import uvloop

WINDOW_S = 10.0
_PAUSE_AFTER_REFUSAL_S = 0.1
_GRACE_S = 60.0


@dataclass(slots=True)
class Load:
    """What came back: for each answer, when (seconds since the start), after how long, and its status."""

    seconds: float
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    lost: int = 0
    """Connections that broke, or requests without an answer at the end."""

    @property
    def statuses(self) -> dict[int, int]:
        return dict(Counter(status for _, _, status in self.answers))

    @property
    def rate(self) -> float:
        """Queries answered per second."""
        return sum(status == 200 and at <= self.seconds for at, _, status in self.answers) / self.seconds

    def windows(self) -> list[Window]:
        """One per `WINDOW_S`."""
        return [self._window(first * WINDOW_S) for first in range(max(1, int(self.seconds / WINDOW_S)))]

    def _window(self, start: float) -> Window:
        inside = [answer for answer in self.answers if start <= answer[0] < start + WINDOW_S]
        latencies = [latency for _, latency, status in inside if status == 200]
        refused = sum(status != 200 for _, _, status in inside)
        if len(latencies) < 2:
            return Window(start, len(latencies), refused, float("nan"), float("nan"))
        cuts = statistics.quantiles(latencies, n=100, method="inclusive")
        return Window(start, len(latencies), refused, 1000 * cuts[49], 1000 * cuts[94])


@dataclass(frozen=True, slots=True)
class Window:
    start_s: float
    answered: int
    refused: int
    p50_ms: float
    p95_ms: float


def run_load(url: str, queries: Sequence[str], *, clients: int, seconds: float, k: int) -> Load:
    """Ask `queries`, over and over, for `seconds`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(url, queries, clients, seconds, k))


async def _run(url: str, queries: Sequence[str], clients: int, seconds: float, k: int) -> Load:
    address = urlsplit(url)
    assert address.hostname is not None and address.port is not None, url
    requests = [_request(address.netloc, query, k) for query in queries]
    load = Load(seconds)
    loop = asyncio.get_running_loop()
    numbers, started = count(), loop.time()
    connections = [_Client(requests, numbers, load, started) for _ in range(clients)]
    for connection in connections:
        await loop.create_connection(lambda it=connection: it, address.hostname, address.port)  # type: ignore[misc]
    await asyncio.wait([connection.finished for connection in connections], timeout=seconds + _GRACE_S)
    load.lost += sum(not connection.finished.done() for connection in connections)
    return load


def _request(host: str, query: str, k: int) -> bytes:
    body = json.dumps({"queries": [query], "topk": k, "return_scores": True}).encode()
    head = (
        f"POST /retrieve HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Client(asyncio.Protocol):
    """One connection: the next request goes out when the answer to the last one is complete."""

    def __init__(self, requests: list[bytes], numbers: Iterator[int], load: Load, started: float) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests = requests
        self._numbers = numbers
        self._load = load
        self._started = started
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not to be asserted: uvloop's is none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def _ask(self) -> None:
        self._received = b""
        self._asked = time.perf_counter()
        self._transport.write(self._requests[next(self._numbers) % len(self._requests)])

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        loop = asyncio.get_running_loop()
        status = int(head[9:12])
        at = loop.time() - self._started
        self._load.answers.append((at, time.perf_counter() - self._asked, status))
        if at >= self._load.seconds:
            self._end()
        elif status == 200:
            self._ask()
        else:
            loop.call_later(_PAUSE_AFTER_REFUSAL_S, self._ask)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.finished.done():
            self._load.lost += 1
            self._end()

    def _end(self) -> None:
        self.finished.set_result(None)
        self._transport.close()
