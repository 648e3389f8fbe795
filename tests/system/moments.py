"""Moments of a run at which a test wants to strike.

Processes of the run announce them and wait there, so that the strike falls within. They also note each unit of work
that they begin and that they end: what is begun twice was done again.

A moment is armed by the test, reached by the first process that comes by, and over when the test says so. All of that
is files in one directory, which the variable `MOMENTS` names; `install` is Ray's hook for new worker processes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wrapt

VARIABLE = "MOMENTS"
E_STEP, SCORING, M_STEP, CHECKPOINT, PUSH, EVALUATION = (
    "e-step",
    "scoring",
    "m-step",
    "checkpoint",
    "push",
    "evaluation",
)
HELD_S = 180.0
"""Longest time that a process waits for a moment to be over, in seconds."""
PAUSE_S = 0.02


@dataclass(frozen=True)
class Unit:
    """An episode or an optimiser step that was begun, or ended."""

    at: float
    has_ended: bool
    name: str

    @classmethod
    def of(cls, line: str) -> Unit:
        at, what, name = line.split(" ", 2)
        return cls(float(at), what == "ended", name)


class Moments:
    """Both ends of a directory of moments."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # ---------------------------------------------------------------- the test's end

    def arm(self, moment: str) -> None:
        """The next process that comes by is held there."""
        for path in self.directory.glob(f"{moment}.*"):
            path.unlink()
        (self.directory / f"{moment}.armed").touch()

    def reached_by(self, moment: str) -> int | None:
        """The process that is held there."""
        for path in self.directory.glob(f"{moment}.by.*"):
            return int(path.suffix[1:])
        return None

    def end(self, moment: str) -> None:
        """It may go on."""
        (self.directory / f"{moment}.over").touch()

    def work(self) -> list[Unit]:
        """All that was begun and ended, in the order of time."""
        if not (log := self.directory / "work.log").exists():
            return []
        units = map(Unit.of, log.read_text(encoding="utf-8").splitlines())
        return sorted(units, key=lambda unit: unit.at)

    # ---------------------------------------------------------------- the run's end

    @contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """A unit of work, while the block runs."""
        self._note("begun", name)
        yield
        self._note("ended", name)

    def _note(self, what: str, name: str) -> None:
        with (self.directory / "work.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.time():.3f} {what} {name}\n")

    def hold(self, moment: str) -> None:
        for _ in self._until_over(moment):
            time.sleep(PAUSE_S)

    async def hold_async(self, moment: str) -> None:
        for _ in self._until_over(moment):
            await asyncio.sleep(PAUSE_S)

    def _until_over(self, moment: str) -> Iterator[None]:
        try:
            os.rename(self.directory / f"{moment}.armed", self.directory / f"{moment}.by.{os.getpid()}")
        except FileNotFoundError:
            return
        until = time.monotonic() + HELD_S
        while time.monotonic() < until and not (self.directory / f"{moment}.over").exists():
            yield


def install() -> None:
    """Put the moments into a process of a run; each module's as soon as that is imported."""
    moments = Moments(Path(os.environ[VARIABLE]))

    @wrapt.when_imported("actors.rollout")
    def of_rollouts(module: Any) -> None:
        worker = module.RolloutWorker
        episode, update = worker._episode, worker.update_weights

        async def noted_episode(self: Any, request: Any, sample: int) -> Any:
            is_greedy = request.sampling.temperature == 0
            kind = EVALUATION if is_greedy else E_STEP
            version = self.engine.weights.version
            with moments.unit(f"{kind} {version} {request.sampling.seed} {request.task.id} {sample}"):
                await moments.hold_async(kind)
                return await episode(self, request, sample)

        async def noted_update(self: Any, *arguments: Any, **keywords: Any) -> Any:
            await moments.hold_async(PUSH)
            return await update(self, *arguments, **keywords)

        worker._episode, worker.update_weights = noted_episode, noted_update

    @wrapt.when_imported("actors.engine")
    def of_scores(module: Any) -> None:
        score = module.VllmEngine.token_logprobs

        async def noted_score(self: Any, *arguments: Any, **keywords: Any) -> Any:
            await moments.hold_async(SCORING)
            return await score(self, *arguments, **keywords)

        module.VllmEngine.token_logprobs = noted_score

    @wrapt.when_imported("actors.learner")
    def of_training(module: Any) -> None:
        step = module.Learner._optimizer_step

        def noted_step(self: Any, *arguments: Any, **keywords: Any) -> Any:
            noted = moments.unit(f"{M_STEP} {self._phase.key} {len(self._phase.history)}")
            with noted if self.rank == 0 else nullcontext():
                if self._phase.history:
                    moments.hold(M_STEP)
                return step(self, *arguments, **keywords)

        module.Learner._optimizer_step = noted_step

    @wrapt.when_imported("actors.learner_state")
    def of_checkpoints(module: Any) -> None:
        write = module.write

        def noted_write(*arguments: Any, **keywords: Any) -> Any:
            moments.hold(CHECKPOINT)
            return write(*arguments, **keywords)

        module.write = noted_write
