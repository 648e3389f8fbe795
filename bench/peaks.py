"""Peak memory of an engine and of a learner rank, each in processes of their own, as the run's actors have them.

    python -m bench.peaks engine MODEL '{"kv_cache_gib": 0.5, ...}'      (what `bench.plan` starts)

What is measured is the anonymous memory of `bench.memory`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.memory import anonymous, tree

if TYPE_CHECKING:
    from actors.engine import VllmEngine

SAMPLE_S = 0.02
"""Seconds between two looks at the processes."""
SETTLE_S = 20.0
"""Until freed memory has gone back to the kernel, in seconds."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a process and its descendants: the most anonymous memory that they had together, and their processor time."""

    bytes: int
    cpu_s: float


def asleep(model: Path, settings: dict[str, Any], environment: Mapping[str, str]) -> dict[str, int]:
    """Anonymous memory, in bytes, of an engine that has served: awake, and some seconds after it fell asleep.

    Raises:
        CalledProcessError: it failed.
    """
    done = subprocess.run(
        _command("sleeper", model, settings), env=_with(environment), check=True, stdout=subprocess.PIPE
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(what: str, model: Path, settings: dict[str, Any], environment: Mapping[str, str]) -> Measured:
    """Start `python -m bench.peaks WHAT MODEL SETTINGS` with that beside this process' environment, and watch it.

    Raises:
        RuntimeError: it failed.
    """
    command = _command(what, model, settings)
    most, before = 0, _cpu_seconds()
    with subprocess.Popen(command, env=_with(environment)) as process:
        while process.poll() is None:
            most = max(most, sum(map(anonymous, tree(process.pid))))
            time.sleep(SAMPLE_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return Measured(most, _cpu_seconds() - before)


def _command(what: str, model: Path, settings: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "bench.peaks", what, str(model), json.dumps(settings)]


def _with(environment: Mapping[str, str]) -> dict[str, str]:
    return os.environ | dict(environment) | {"HF_HUB_OFFLINE": "1"}


def _cpu_seconds() -> float:
    """Of children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


# ---------------------------------------------------------------- what is measured


def rank(model: str, settings: dict[str, Any]) -> None:
    """One learner rank that takes some optimiser steps over full rows."""
    from actors.learner import Learner
    from pipeline.core.config import LearnerConfig
    from pipeline.core.losses.likelihood import WeightedNll
    from pipeline.core.records import Example

    length, trained, rows = settings.pop("length"), settings.pop("trained"), settings.pop("rows")
    config = LearnerConfig(**settings)
    learner = Learner(config, model)
    rng = np.random.default_rng(0)
    mask = np.arange(length) >= length - trained
    examples = [
        Example(
            str(n),
            str(n),
            "policy",
            rng.integers(0, 256, length).astype(np.int32),
            mask,
            {"log_weight": np.zeros(1)},
        )
        for n in range(rows)
    ]
    learner.train(examples, WeightedNll(), phase_seed=0)


def engine(model: str, settings: dict[str, Any]) -> None:
    """One engine that serves as many requests as it takes at once, until its cache of keys and values is full."""

    async def serve() -> None:
        (await _served(model, settings)).shutdown()

    asyncio.run(serve())


def sleeper(model: str, settings: dict[str, Any]) -> None:
    """The same, which then sleeps. Prints what it holds before and meanwhile."""

    async def serve() -> None:
        served, held = await _served(model, settings), {}
        for state in ("awake", "asleep"):
            if state == "asleep":
                await served.sleep(60.0)
            await asyncio.sleep(SETTLE_S)
            held[state] = sum(map(anonymous, tree(os.getpid())))
        served.shutdown()
        print(json.dumps(held))

    asyncio.run(serve())


async def _served(model: str, settings: dict[str, Any]) -> VllmEngine:
    """An engine that has answered and scored all requests."""
    from actors.engine import VllmEngine
    from actors.engine_options import EngineOptions
    from pipeline.core.agents.program import Sampling

    prompt, answer, requests = settings.pop("prompt"), settings.pop("answer"), settings.pop("requests")
    served = VllmEngine(EngineOptions(model=model, enforce_eager=True, num_threads=2, **settings))
    await served.start()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, prompt).tolist() for _ in range(requests)]
    await asyncio.gather(
        *(
            served.generate(p, Sampling(max_tokens=answer, seed=n, temperature=1.0))
            for n, p in enumerate(prompts)
        )
    )
    await asyncio.gather(*(served.score(p, prompt // 2) for p in prompts))
    return served


if __name__ == "__main__":
    {"engine": engine, "rank": rank, "sleeper": sleeper}[sys.argv[1]](sys.argv[2], json.loads(sys.argv[3]))
