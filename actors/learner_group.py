"""All ranks of the learner, seen from the driver as one.

A rank that dies takes the others with it: the whole group is started again from its last checkpoint and the M-step is
repeated with the same batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors import learner_setup
from actors.learner import LearnerRank
from actors.weight_transfer import EngineRef, PushReport, Transport
from pipeline.core.config import LearnerConfig
from pipeline.core.losses.loss import Loss
from pipeline.core.policies import Head
from pipeline.core.training import TrainReport

logger = logging.getLogger(__name__)

MAX_RESTARTS = 2
"""Times that a dead group is started again in one M-step."""
COLLECTIVE_TIMEOUT_S = 3600.0
"""Longest wait for all ranks to save, load or export, in seconds."""
POLL_S = 0.5
"""Seconds between two looks at the progress of an M-step."""


class LearnerError(RuntimeError):
    """The learner died too often, or did not start in time."""


class LearnerGroup:
    """Starts one `LearnerRank` per set of actor options.

    Args:
        config: the `learner` section.
        model: directory or hub name of the weights to start from.
        state: a checkpoint of `save` to go on from; None to start with a fresh optimiser.
        options: Ray actor options of each rank.
        seed: of adapters and dropout.
        head: what the model computes.
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
    ) -> None:
        self.config, self.head = config, head
        self._model, self._state = model, state
        self._options = options
        self._seed = seed
        self._start()

    def train(
        self,
        shards: Sequence[Path],
        loss: Loss,
        *,
        phase_seed: int,
        learning_rate: float | None = None,
        epochs: int | None = None,
        on_progress: Callable[[float, float], None],
    ) -> TrainReport:
        """One phase over Parquet shards of examples; see `Learner.train`.

        Raises:
            LearnerError: ranks died more than `MAX_RESTARTS` times.
        """
        for attempt in range(MAX_RESTARTS + 1):
            calls = [
                rank.train.remote(
                    list(shards), loss, phase_seed=phase_seed, learning_rate=learning_rate, epochs=epochs
                )
                for rank in self.ranks
            ]
            try:
                self._watch(calls, on_progress)
                report: TrainReport = ray.get(calls)[0]
                return report
            except RayActorError as error:
                if attempt == MAX_RESTARTS:
                    raise LearnerError(
                        f"learner ranks died {attempt + 1} times in one M-step; last: {error}"
                    ) from error
                logger.warning(f"a learner rank died; all start again from the last checkpoint: {error}")
                self.close()
                self._start()
        raise AssertionError("unreachable")

    def save(self, path: Path) -> None:
        """Write everything needed to go on; later restarts begin there."""
        self._all("save", path)
        self._state = path

    def export(self, path: Path) -> None:
        """Write a Hugging Face model directory."""
        self._all("export", path)

    def rest(self) -> None:
        """Move what only training needs out of the GPUs' memory, until the next `train`."""
        self._all("rest")

    def push(
        self, engines: Sequence[EngineRef], transport: Transport, version: int, *, deadline_s: float
    ) -> PushReport:
        """Send the weights to all engines as `version`."""
        address, port = ray.get(self.ranks[0].rendezvous.remote(), timeout=60)
        reports: list[PushReport | None] = self._all(
            "push", engines, transport, version, address, port, deadline_s, timeout_s=2 * deadline_s
        )
        return next(report for report in reports if report is not None)

    def close(self) -> None:
        """End all ranks."""
        for rank in self.ranks:
            ray.kill(rank)

    def _start(self) -> None:
        address, port = ray.get(
            ray.remote(learner_setup.free_address).options(**self._options[0]).remote(),
            timeout=self.config.start_timeout_s,
        )
        self.ranks = [
            LearnerRank.options(**options).remote(  # type: ignore[attr-defined]
                self.config,
                self._model,
                rank=rank,
                world_size=len(self._options),
                master_addr=address,
                master_port=port,
                seed=self._seed,
                head=self.head,
            )
            for rank, options in enumerate(self._options)
        ]
        try:
            ray.get([rank.progress.remote() for rank in self.ranks], timeout=self.config.start_timeout_s)
        except GetTimeoutError as error:
            self.close()
            raise LearnerError(
                f"{len(self.ranks)} learner ranks did not start within {self.config.start_timeout_s:.0f} s "
                "(learner.start_timeout_s)"
            ) from error
        if self._state is not None:
            self._all("load", self._state)

    def _watch(self, calls: list[Any], on_progress: Callable[[float, float], None]) -> None:
        """Report progress until all ranks are done; one that dies raises at once, while the others still wait."""
        pending = list(calls)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_S)
            ray.get(done)
            if pending and not done:
                state = ray.get(self.ranks[0].progress.remote(), timeout=60)
                on_progress(state["step"], state["num_steps"] or 1)

    def _all(self, method: str, *arguments: Any, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> list[Any]:
        calls = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        try:
            return list(ray.get(calls, timeout=timeout_s))
        except GetTimeoutError as error:
            raise LearnerError(
                f"{len(calls)} learner ranks did not end {method} within {timeout_s:.0f} s"
            ) from error
