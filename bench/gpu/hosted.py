"""An engine on an event loop of its own thread, for code that is not asynchronous; no Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from actors.engine import VllmEngine
from actors.engine_options import EngineOptions
from actors.weight_bucket import Segment

T = TypeVar("T")


class HostedEngine:
    """A started `VllmEngine`. It is all the engines of `actors.weight_transfer.Engines` as well: the one to push to."""

    world_sizes: Sequence[int] = (1,)

    def __init__(self, engine: VllmEngine, loop: asyncio.AbstractEventLoop) -> None:
        self.missed: dict[int, str] = {}
        self.engine = engine
        self._loop = loop

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 600.0) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        return [self.run(getattr(self.engine, method)(*args), timeout_s)]

    def call_each(self, method: str, args: Sequence[Any], timeout_s: float) -> list[Any]:
        return self.call(method, args[0], timeout_s=timeout_s)

    def send_segment(self, manifest: dict[str, Any], segment: Segment, timeout_s: float) -> None:
        self.call("update_weights", {**manifest, "path": segment.path}, timeout_s=timeout_s)


@contextmanager
def hosted(options: EngineOptions) -> Iterator[HostedEngine]:
    """Starts an engine and ends it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    host = HostedEngine(VllmEngine(options), loop)
    try:
        host.run(host.engine.start(), options.start_timeout_s)
        yield host
    finally:
        host.engine.shutdown()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def engine_options(model: Path, device: str, **changes: Any) -> EngineOptions:
    """Options for a small check on either kind of device."""
    options = EngineOptions(
        model=str(model),
        max_model_len=2048,
        max_num_seqs=128,
        gpu_memory_utilization=0.4,
        kv_cache_gib=0.5,
        enforce_eager=device == "cpu",
        num_threads=2 if device == "cpu" else None,
        start_timeout_s=300.0,
    )
    return replace(options, **changes)


def scored_per_s(host: HostedEngine, texts: Sequence[list[int]], start: int) -> float:
    """How many texts per second are scored from token `start` on, all asked for at once."""

    async def all_of_them() -> None:
        await asyncio.gather(*(host.engine.score(text, start) for text in texts))

    began = time.perf_counter()
    host.run(all_of_them())
    return len(texts) / (time.perf_counter() - began)
