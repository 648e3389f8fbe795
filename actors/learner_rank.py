"""A learner rank as a Ray actor: it also says where it is, and pushes its weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from actors import metrics
from actors.actor_log import Identity, introduce, introduce_libraries
from actors.learner import Learner
from actors.weight_transfer import (
    EngineRef,
    PushReport,
    RayEngines,
    SharedMemorySender,
    Transport,
    VllmSender,
    WeightSender,
)
from pipeline.core.training import TrainReport

logger = logging.getLogger(__name__)


@ray.remote(concurrency_groups={"progress": 1})
class LearnerRank(Learner):
    """`Learner` as a Ray actor; `progress` has a thread of its own and answers while `train` runs.

    Args:
        identity: under which it logs; rank 0 counts.
        arguments, options: those of `Learner`.
    """

    def __init__(self, *arguments: Any, identity: Identity | None = None, **options: Any) -> None:
        introduce(identity)
        super().__init__(*arguments, **options)
        introduce_libraries()

    def train(self, *arguments: Any, **options: Any) -> TrainReport:
        report = super().train(*arguments, **options, on_step=self._note_step)
        logger.info(
            f"trained {report.steps} steps in {report.seconds:.1f} s, from step {report.resumed_at} on"
        )
        return report

    def checkpoint(self, path: str | Path) -> None:
        with self._counted_checkpoint(path):
            super().checkpoint(path)

    def save(self, path: str | Path, model: str | Path | None = None) -> None:
        with self._counted_checkpoint(path):
            super().save(path, model)

    @contextmanager
    def _counted_checkpoint(self, path: str | Path) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        logger.info(f"checkpoint {path}: held up for {seconds:.1f} s")
        if self.rank == 0:
            metrics.CHECKPOINTS.add()
            metrics.CHECKPOINT_SECONDS.add(seconds)

    def _note_step(self, step: dict[str, float]) -> None:
        if self.rank:
            return
        metrics.STEPS.add()
        if math.isfinite(step["grad_norm"]):
            metrics.TRAINED_TOKENS.add(step["tokens"])
            metrics.LOSS.set(step["loss"])
            metrics.GRADIENT_NORM.set(step["grad_norm"])
        else:
            metrics.SKIPPED.add()
        done, total = self._progress["step"], self._progress["num_steps"]
        metrics.TRAINING_DONE.set(done / total)
        logger.info(
            f"step {done:.0f} of {total:.0f}: loss {step['loss']:.4g}, gradient {step['grad_norm']:.4g}"
        )

    @ray.method(concurrency_group="progress")
    def progress(self) -> dict[str, float]:
        return super().progress()

    def push(
        self,
        engines: Sequence[EngineRef],
        transport: Transport,
        version: int,
        deadline_s: float,
    ) -> PushReport | None:
        """Send the weights to all engines as `version` (collective); the report comes from rank 0.

        Args:
            engines: whom to send to.
            transport: how.
            version: what the engines will say they serve.
            deadline_s: the longest that the push may take, in seconds.

        Raises:
            WeightTransferError: an engine did not confirm the version in time.
        """
        receivers = None
        if self.rank == 0:
            node_id = ray.get_runtime_context().get_node_id()
            receivers = RayEngines(engines, node_id, may_miss=transport == "shared_memory")
        sender: WeightSender
        if transport == "shared_memory":
            sender = SharedMemorySender(receivers, self.named_weights, deadline_s=deadline_s)
        else:
            sender = VllmSender(
                transport,
                receivers,
                self.named_weights,
                rank=self.rank,
                deadline_s=deadline_s,
                largest_tensor_bytes=self.largest_tensor_bytes(),
            )
        return sender.push(version)
