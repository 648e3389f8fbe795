"""A policy at run time: the one place that knows which version it is, which its engines serve and which its learner
holds.

`restore` and `save` say what the policy *is*; engines and learner are brought there when they are needed, by the
shortest way: a push from the learner if that holds the version, else from disk. On a small machine policies take turns
on the same devices; who trains or samples asks the others to make room, and the recipe does not notice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import GetTimeoutError

from actors import metrics
from actors.deaths import DEATHS, in_words
from actors.learner_group import LearnerError, LearnerGroup, OnSteps
from actors.observer import Observer
from actors.placement import PolicyPlacement
from actors.pool import EnginePool
from actors.session import ClusterError
from actors.weight_transfer import PushReport, WeightTransferError
from pipeline.core.losses.joint import Joint
from pipeline.core.losses.loss import Loss
from pipeline.core.policies import PolicySpec, Snapshot
from pipeline.core.records import Floats, ScoreRequest
from pipeline.core.training import TrainReport
from retriever_service import interrupts

logger = logging.getLogger(__name__)

SCORES_AT_ONCE = 64
"""Spans of one call to a worker."""


class Turns:
    """Who may use the devices that policies share.

    Args:
        take_turns: engines and learners are on the same GPUs and give their memory to each other.
        park_on_disk: a learner's processes end while another policy trains, and start again from its last checkpoint.
    """

    def __init__(self, *, take_turns: bool, park_on_disk: bool) -> None:
        self.policies: list[Policy] = []
        self._take_turns, self._park_on_disk = take_turns, park_on_disk

    def to_train(self, policy: Policy) -> None:
        """`policy` is about to train."""
        for other in self.policies:
            if other is not policy and self._park_on_disk:
                other.park()
            if self._take_turns:
                if other is not policy:
                    other.rest()
                if other.pool is not None:
                    other.pool.must_be_idle(f"to give their memory to the learner of {policy.name}")
                    other.pool.sleep()

    def to_sample(self) -> None:
        """Engines are about to be woken."""
        if self._take_turns:
            for policy in self.policies:
                policy.rest()


class Policy:
    """One policy of a run; `Cluster.policy` gives it.

    Args:
        spec: what it is.
        start: the version that it begins as.
        pool: its engines; None if it is never sampled from.
        placement: where its ranks go.
        rank_options: Ray options of each rank.
        turns: shared by all policies of the run.
        push_timeout_s: deadline of a push, in seconds.
        status: shows a person what is being waited for.
        observer: of the run.
    """

    def __init__(
        self,
        spec: PolicySpec,
        start: Snapshot,
        pool: EnginePool | None,
        *,
        placement: PolicyPlacement,
        rank_options: Sequence[dict[str, Any]],
        turns: Turns,
        push_timeout_s: float,
        status: Callable[[str], AbstractContextManager[None]] = lambda text: nullcontext(),
        observer: Observer | None = None,
    ) -> None:
        self.spec, self.name, self.pool = spec, spec.name, pool
        self.current = start
        """The version that this policy is. The learner may have trained on since."""
        self.pushed: PushReport | None = None
        """How the version came to the engines that they serve; None where no push brought it."""
        self._learner: LearnerGroup | None = None
        self._learner_holds: int | None = None
        """Version of the learner's weights; None if they belong to no version: no learner, or trained and not saved."""
        self._placement, self._rank_options, self._turns = placement, rank_options, turns
        self._push_timeout_s, self._status = push_timeout_s, status
        self._observer = observer or Observer()
        turns.policies.append(self)

    # ---------------------------------------------------------------- versions

    def restore(self, snapshot: Snapshot) -> None:
        """Be that version from now on. Costs nothing until the policy is sampled from, scored or trained."""
        self.current = snapshot

    def save(self, version: int, *, state: Path, model: Path) -> Snapshot:
        """Write what the learner holds and be that version: a checkpoint to go on from, and a model directory.

        Args:
            state, model: directories on a file system that all ranks share.
        """
        learner = self._learner_or_error("saved")
        learner.save(state, model)
        self._learner_holds = version
        self.current = Snapshot(version, str(model), state)
        return self.current

    def push(self) -> PushReport | None:
        """Bring the current version to the engines; sampling does it by itself where it was not done.

        An engine that misses it is ended. Where all do, or the learner fails, they load the version from its model
        directory.

        Returns:
            the report of a push from the learner, which `pushed` keeps; None if the engines served it already, or
            loaded it from disk.

        Raises:
            ClusterError: the policy has no engines, or they sample with another version.
        """
        pool = self._pool_or_error()
        if pool.serving == self.current.version:
            return None
        pool.must_be_idle(f"to serve version {self.current.version}")
        self._turns.to_sample()
        pool.serving = self.pushed = None
        pool.lose_silent()
        self.pushed = self._push_from_learner(pool)
        if self.pushed is None:
            pool.reload(self.current)
            metrics.PUSHES.add(policy=self.name, way="from_disk")
        else:
            pool.now_serves(self.current)
            self._count(self.pushed)
        return self.pushed

    def _push_from_learner(self, pool: EnginePool) -> PushReport | None:
        """None where the learner does not hold the version, or no engine got it."""
        receivers, transport = pool.receivers(), self._placement.transport
        if self._learner is None or self._learner_holds != self.current.version or not receivers:
            return None
        try:
            report = self._learner.push(
                receivers, transport, self.current.version, deadline_s=self._push_timeout_s
            )
        except (WeightTransferError, LearnerError, *DEATHS, GetTimeoutError) as error:
            logger.warning(
                f"the push of version {self.current.version} of {self.name} failed; the engines load it from "
                f"{self.current.model}: {in_words(error)}"
            )
            # A learner that did not end the push by itself is dead or stuck, and nothing can be said of one whose
            # broadcast broke. It starts again from its checkpoint when it is needed.
            if transport != "shared_memory" or not isinstance(error, WeightTransferError):
                self._close_learner()
            pool.lose_silent()
            metrics.PUSHES.add(policy=self.name, way="failed")
            return None
        for number, cause in report.missed.items():
            pool.lost(receivers[number].handle, f"it missed version {report.version}: {cause}")
        return report

    def _count(self, report: PushReport) -> None:
        metrics.PUSHES.add(policy=self.name, way="sent")
        metrics.PUSH_SECONDS.add(report.seconds, policy=self.name)
        metrics.PUSH_BYTES.add(report.nbytes, policy=self.name)
        metrics.PUSH_MISSED.add(len(report.missed), policy=self.name)

    # ---------------------------------------------------------------- verbs

    def train(
        self,
        shards: Sequence[Path],
        loss: Loss | Joint,
        *,
        state: Path,
        seed: int,
        learning_rate: float | None = None,
        epochs: int | None = None,
        on_progress: OnSteps = lambda done, total, begun_at: None,
    ) -> TrainReport:
        """Train from the current version on; `save` makes a version of the result.

        Args:
            shards: Parquet files of examples.
            loss: what is minimised.
            state: where checkpoints of this training go from time to time, and its last one by `save`. One that is
                there already, of a run that was cut off in this very training, is gone on from.
            seed: of the order of the examples.
            learning_rate, epochs: in place of the configured ones.
            on_progress: told where training stands.

        Raises:
            LearnerError: ranks died too often, or did not start in time.
            ClusterError: the policy is frozen.
        """
        self._turns.to_train(self)
        learner = self._learner_at_current()
        self._learner_holds = None
        return learner.train(
            shards,
            loss,
            checkpoints=state,
            phase_seed=seed,
            learning_rate=learning_rate,
            epochs=epochs,
            on_progress=on_progress,
        )

    def score(self, spans: Sequence[ScoreRequest]) -> list[Floats]:
        """log p of each token from `start` on, of each span, under the current version.

        Returns:
            float32 arrays, in the order of the spans.

        Raises:
            EngineError: an engine failed on a span twice.
            ClusterError: engines died too often, or took too long.
        """
        pool = self._pool_or_error()
        self.push()
        batches = [spans[first : first + SCORES_AT_ONCE] for first in range(0, len(spans), SCORES_AT_ONCE)]
        seconds = pool.options.request_timeout_s * max(1, len(batches))
        try:
            answers = interrupts.run(asyncio.wait_for(_scores(pool, batches), seconds))
        except TimeoutError as error:
            raise ClusterError(
                f"waited {seconds:.0f} s for {self.name} to score {len(spans)} spans (rollout.timeout_s)"
            ) from error
        return [np.asarray(logprobs, dtype=np.float32) for batch in answers for logprobs in batch]

    # ---------------------------------------------------------------- taking turns

    def rest(self) -> None:
        """Let the learner give to others what it needs only for training."""
        if self._learner is not None:
            self._learner.rest()

    def park(self) -> None:
        """End the learner's processes; the next `train` starts them from the last checkpoint.

        Raises:
            ClusterError: it was trained and not saved.
        """
        if self._learner is not None:
            if self._learner_holds is None:
                raise ClusterError(f"the learner of {self.name} must be saved before another policy trains")
            self._close_learner()

    def close(self) -> None:
        """End engines and learner."""
        if self._learner is not None:
            self._close_learner()
        if self.pool is not None:
            self.pool.close()

    # ---------------------------------------------------------------- inside

    def _learner_at_current(self) -> LearnerGroup:
        """The learner with the weights and the optimiser of the current version.

        Without a checkpoint it starts on the snapshot's model. A checkpoint is loaded over the model that the policy
        began with: one of LoRA holds the adapters alone, and on an exported model, which has them merged, they would
        count twice.
        """
        if self._learner is not None and self._learner_holds == self.current.version:
            return self._learner
        if self.spec.learner is None:
            raise ClusterError(f"the policy {self.name} is frozen and cannot be trained")
        if self._learner is not None:
            self._close_learner()
        state = self.current.state
        with self._status(f"starting the learner of {self.name}"):
            self._learner = LearnerGroup(
                self.spec.learner,
                self.spec.model.path if state is not None else self.current.model,
                state=state,
                options=self._rank_options,
                seed=self.spec.seed,
                head=self.spec.head,
                latent=self.spec.latent,
                name=self.name,
                observer=self._observer,
            )
        self._learner_holds = self.current.version
        return self._learner

    def _close_learner(self) -> None:
        assert self._learner is not None
        self._learner.close()
        self._learner, self._learner_holds = None, None

    def _learner_or_error(self, what: str) -> LearnerGroup:
        if self._learner is None:
            raise ClusterError(f"the policy {self.name} has not been trained and cannot be {what}")
        return self._learner

    def _pool_or_error(self) -> EnginePool:
        if self.pool is None:
            raise ClusterError(f"the policy {self.name} has no engines and cannot be sampled from or scored")
        return self.pool


async def _scores(pool: EnginePool, batches: Sequence[Sequence[ScoreRequest]]) -> list[list[list[float]]]:
    """Each batch from one worker, or from another where that one dies."""

    async def score(slot: int, batch: Sequence[ScoreRequest]) -> list[list[float]]:
        while True:
            worker = await pool.worker_for(slot)
            try:
                answer: list[list[float]] = await worker.token_logprobs.remote(batch)
                return answer
            except DEATHS as error:
                pool.lost(worker, in_words(error))

    async with pool.at_work():
        return await asyncio.gather(*(score(number, batch) for number, batch in enumerate(batches)))
