"""All ranks of the learner, seen from the driver as one.

A rank that dies, or gives no sign of life, takes the others with it: the whole group is started again, goes to where it
was from the newest checkpoint, and does again what it was doing. Whoever calls a method need not know.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors import learner_files, learner_setup
from actors.deaths import DEATHS, RESTART_PAUSE_S, in_words
from actors.learner_rank import LearnerRank
from actors.observer import Observer
from actors.weight_transfer import EngineRef, PushReport, Transport
from pipeline.core.config import LearnerConfig
from pipeline.core.errors import RunError, UserError
from pipeline.core.latent_tasks import LatentTasks
from pipeline.core.losses.joint import Joint
from pipeline.core.losses.loss import Loss
from pipeline.core.plan.run_plan import SAVES_GPU_MEMORY
from pipeline.core.policies import Head
from pipeline.core.training import TrainReport
from retriever_service.backoff import Backoff

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnSteps = Callable[[float, float, float], None]
"""Told the optimiser steps that are done, of how many, and behind which one the ranks began."""

MAX_RESTARTS = 2
"""Times in a row that a dead group is started again without an optimiser step further in between."""
COLLECTIVE_TIMEOUT_S = 3600.0
"""Longest wait for all ranks to save or load, in seconds."""
POLL_S = 0.5
"""Seconds between two looks at the progress of the ranks."""
PING_TIMEOUT_S = 30.0
"""How long a rank may take to answer at all, in seconds."""


class LearnerError(RunError):
    """The learner died too often, or did not start in time."""


class _Stalled(Exception):
    """Ranks live and give no sign of life."""


@dataclass(frozen=True)
class _Phase:
    """An M-step that was begun: what is needed to do it again."""

    shards: list[Path]
    loss: Loss | Joint
    settings: dict[str, Any]
    checkpoints: Path


class LearnerGroup:
    """Starts one `LearnerRank` per set of actor options.

    Args:
        config: the `learner` section.
        model: directory or hub name of the weights to start from.
        state: a checkpoint of `save` to go on from; None to start with a fresh optimiser.
        options: Ray actor options of each rank.
        seed: of adapters and dropout.
        head: what the model computes.
        latent: latent tasks that it is to have.
        name: of the policy.
        observer: of the run.
    """

    def __init__(
        self,
        config: LearnerConfig,
        model: str,
        *,
        state: Path | None,
        options: Sequence[dict[str, Any]],
        seed: int,
        head: Head = "lm",
        latent: LatentTasks | None = None,
        name: str = "",
        observer: Observer | None = None,
    ) -> None:
        self.config, self.head, self.latent = config, head, latent
        self._name, self._observer = name, observer or Observer()
        self._model, self._state = model, state
        self._options = options
        self._seed = seed
        self._phase: _Phase | None = None  # trained, or being trained, and not saved
        self.ranks: list[Any] = []
        self._store: Any = None  # where they meet, open as long as they live
        self._holds_state = False  # the ranks have gone to where the group was
        self._backoff = Backoff(RESTART_PAUSE_S)
        self._step = -1.0  # that the ranks were seen to have done of their phase
        self._whatever_dies("start", lambda: None)

    def train(
        self,
        shards: Sequence[Path],
        loss: Loss | Joint,
        *,
        checkpoints: Path,
        phase_seed: int,
        learning_rate: float | None = None,
        epochs: int | None = None,
        on_progress: OnSteps,
    ) -> TrainReport:
        """One phase over Parquet shards of examples; see `Learner.train`.

        Args:
            checkpoints: where it is saved from time to time; what is there of this very phase is gone on from.

        Raises:
            LearnerError: ranks died too often without getting further in between.
            UserError: more steps than may be skipped have a gradient that is not finite, or a checkpoint cannot be
                written.
        """
        settings = {"phase_seed": phase_seed, "learning_rate": learning_rate, "epochs": epochs}
        self._phase = phase = _Phase(list(shards), loss, settings, checkpoints)
        return self._whatever_dies("train", lambda: self._train(phase, on_progress))

    def save(self, state: Path, model: Path) -> None:
        """Write everything needed to go on, where later restarts begin, and a Hugging Face model directory.

        Raises:
            UserError: the disk is full, or a weight is not finite.
        """
        self._whatever_dies("save", lambda: self._all("save", state, model))
        self._state, self._phase = state, None

    def rest(self) -> None:
        """Move what only training needs out of the GPUs' memory, until the next `train`."""
        if self.ranks:
            self._whatever_dies("rest", lambda: self._all("rest"))

    def push(
        self, engines: Sequence[EngineRef], transport: Transport, version: int, *, deadline_s: float
    ) -> PushReport:
        """Send the weights to all engines as `version`."""

        def send() -> PushReport:
            reports: list[PushReport | None] = self._all(
                "push", engines, transport, version, deadline_s, timeout_s=2 * deadline_s
            )
            return next(report for report in reports if report is not None)

        return self._whatever_dies("push", send)

    def close(self) -> None:
        """End all ranks."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks, self._store = [], None

    # ---------------------------------------------------------------- up, and up again

    def _whatever_dies(self, what: str, work: Callable[[], T]) -> T:
        """`work` on ranks that hold what they should; again on new ones when some die or stall.

        Raises:
            LearnerError: that happened more than `MAX_RESTARTS` times in a row without an optimiser step further.
        """
        deaths, furthest = 0, -1.0
        while True:
            try:
                if not self.ranks:
                    self._start()
                    if deaths:
                        self._observer.restarted("learner", self._name)
                if not self._holds_state and what not in ("start", "train"):
                    self._catch_up()
                return work()
            except (*DEATHS, _Stalled) as error:
                self.close()
                self._observer.lost("learner", self._name)
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    raise _refusal(error) from error  # it would fail again
                deaths = deaths + 1 if self._step <= furthest else 1
                furthest = max(furthest, self._step)
                if deaths > MAX_RESTARTS:
                    raise LearnerError(
                        f"learner ranks died {deaths} times in {what} without getting further; last: {in_words(error)}"
                    ) from error
                logger.warning(
                    f"a learner rank died in {what}; all start again from the last checkpoint: {in_words(error)}"
                )

    def _catch_up(self) -> None:
        """Bring ranks that have just been started to where those before them were."""
        if self._phase is not None:
            self._train(self._phase, lambda done, total, begun_at: None)
        elif self._state is not None:
            self._say_if_moved(self._state)
            self._all("load", self._state)
            self._holds_state = True

    def _train(self, phase: _Phase, on_progress: OnSteps) -> TrainReport:
        start = None if self._holds_state else self._state
        for path in (phase.checkpoints, start):
            if path is not None and not self._holds_state:
                self._say_if_moved(path)
        reports: list[TrainReport] = self._all(
            "train",
            phase.shards,
            phase.loss,
            **phase.settings,
            checkpoints=phase.checkpoints,
            start=start,
            timeout_s=None,
            on_progress=on_progress,
        )
        self._holds_state = True
        for problem in reports[0].damaged_checkpoints:
            logger.warning(
                f"{phase.checkpoints}: {problem}; training went on behind step {reports[0].resumed_at}"
            )
        if skipped := reports[0].skipped_steps:
            logger.warning(
                f"{skipped} of {reports[0].steps} optimiser steps were left out: no finite gradient"
            )
        return reports[0]

    def _say_if_moved(self, checkpoint: Path) -> None:
        """Tell the user when a checkpoint is about to be read on another layout than wrote it."""
        facts = learner_files.facts_of(checkpoint)
        before = facts.get("num_ranks"), facts.get("zero_stage")
        now = len(self._options), self.config.zero_stage
        if facts and before != now:
            logger.warning(
                f"{checkpoint} (optimiser step {facts['step']}) was written by {before[0]} learner ranks at ZeRO stage "
                f"{before[1]}; {now[0]} at stage {now[1]} go on from it. Weights and moments are the same; sums are "
                "rounded in another order, and dropout draws other numbers"
            )

    def _start(self) -> None:
        """Bring new ranks up; again where they go with a node of whose end Ray did not know yet."""
        until = time.monotonic() + self.config.start_timeout_s
        for attempt in itertools.count():
            time.sleep(self._backoff.pause_s(attempt))
            try:
                self._start_once()
            except RayActorError as error:
                self.close()
                if error.actor_init_failed or time.monotonic() > until:
                    raise
                logger.warning(f"a learner rank died while it started; all start again: {in_words(error)}")
            else:
                return

    def _start_once(self) -> None:
        self._holds_state = False
        self._store, store_address = learner_setup.open_store()
        try:
            self.ranks = [
                LearnerRank.options(**options).remote(  # type: ignore[attr-defined]
                    self.config,
                    self._model,
                    rank=rank,
                    world_size=len(self._options),
                    store_address=store_address,
                    seed=self._seed,
                    head=self.head,
                    latent=self.latent,
                    identity=self._observer.identity("learner", self._name, rank),
                )
                for rank, options in enumerate(self._options)
            ]
            ray.get([rank.progress.remote() for rank in self.ranks], timeout=self.config.start_timeout_s)
            for rank in range(len(self.ranks)):
                self._observer.is_up("learner", self._name, rank)
        except GetTimeoutError as error:
            self.close()
            raise LearnerError(
                f"{len(self._options)} learner ranks did not start within {self.config.start_timeout_s:.0f} s "
                "(learner.start_timeout_s)"
            ) from error

    # ---------------------------------------------------------------- waiting

    def _all(
        self,
        method: str,
        *arguments: Any,
        timeout_s: float | None = COLLECTIVE_TIMEOUT_S,
        on_progress: OnSteps = lambda done, total, begun_at: None,
        **options: Any,
    ) -> list[Any]:
        """What all ranks return; what one raises is raised at once, while the others may still wait for it."""
        calls = [getattr(rank, method).remote(*arguments, **options) for rank in self.ranks]
        try:
            self._watch(calls, method, timeout_s, on_progress)
        except RayTaskError as error:
            # Where a rank died, its peers' broken connections may be heard of first.
            self._ask_for_signs_of_life()
            if isinstance(error.cause, FloatingPointError | UserError):
                raise UserError(str(error.cause)) from error
            if isinstance(error.cause, torch.OutOfMemoryError):
                raise UserError(f"learner, in {method}: {error.cause}; {SAVES_GPU_MEMORY}") from error
            raise
        return list(ray.get(calls))

    def _watch(
        self,
        calls: list[Any],
        method: str,
        timeout_s: float | None,
        on_progress: OnSteps,
    ) -> None:
        began = moved = time.monotonic()
        sign, step = self.ranks[0].progress.remote(), -1.0
        pending = list(calls)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_S)
            ray.get(done)
            now = time.monotonic()
            if ray.wait([sign], timeout=0)[0]:
                state = ray.get(sign)
                if state["step"] != step:
                    self._step = step = state["step"]
                    moved = now
                if state["num_steps"]:
                    on_progress(step, state["num_steps"], state["resumed_at"])
                sign = self.ranks[0].progress.remote()
            if pending and timeout_s is not None and now - began > timeout_s:
                raise LearnerError(
                    f"{len(calls)} learner ranks did not end {method} within {timeout_s:.0f} s"
                )
            if pending and now - moved > self.config.stall_timeout_s:
                self._ask_for_signs_of_life()
                logger.warning(
                    f"no progress in {method} for {now - moved:.0f} s; all learner ranks answer, so it goes on"
                )
                moved = time.monotonic()

    def _ask_for_signs_of_life(self) -> None:
        """
        Raises:
            *DEATHS: a rank is dead.
            _Stalled: one does not answer.
        """
        pings = {rank.progress.remote(): number for number, rank in enumerate(self.ranks)}
        answered, silent = ray.wait(list(pings), num_returns=len(pings), timeout=PING_TIMEOUT_S)
        ray.get(answered)
        if silent:
            ranks = ", ".join(str(pings[ping]) for ping in silent)
            raise _Stalled(f"no sign of life from rank {ranks} within {PING_TIMEOUT_S:.0f} s")


def _refusal(error: RayActorError) -> UserError | LearnerError:
    """Why a rank could not be made: Ray tells what its constructor raised as the text of a traceback."""
    if found := re.findall(r"^(?:\w+\.)*UserError: (.*)\Z", str(error), re.MULTILINE | re.DOTALL):
        return UserError(found[-1].strip())
    last = [line for line in str(error).splitlines() if line.strip()][-1].strip()
    return LearnerError(f"a learner rank could not start: {last}")
