"""What a run writes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.config import StorageConfig
from pipeline.core.plan.memory import BYTES, Dtype

CHECKPOINT_BYTES = 12
"""Of a trained parameter: weight and Adam's two moments, in float32 (`learner_state`)."""
TRAJECTORY_BYTES = 18
"""Per token of a trajectory and of its training example, before compression."""


@dataclass(frozen=True, slots=True)
class DiskNeeds:
    """Bytes that a run writes, of all its policies.

    Attributes:
        export: of one version: a model directory.
        checkpoint: of one version.
        shards: trajectories and training examples of all iterations, at most.
        models, states: how many exports and checkpoints are there at once, at most.
    """

    export: int
    checkpoint: int
    shards: int
    models: int
    states: int

    @property
    def next_version(self) -> int:
        """Room without which the next training cannot end."""
        return self.export + self.checkpoint

    @property
    def whole_run(self) -> int:
        return self.models * self.export + self.states * self.checkpoint + self.shards


def disk_needs(
    policies: list[tuple[int, int, Dtype]], storage: StorageConfig, *, versions: int, tokens: float
) -> DiskNeeds:
    """
    Args:
        policies: of each that is trained: its parameters, how many of them are trained, the learner's number format.
        storage: which models and checkpoints stay.
        versions: that are to be trained.
        tokens: of all trajectories.
    """
    models = versions
    if storage.keep_last is not None:  # beside these the one of iteration 0, and the one that is being made
        models = min(versions, storage.keep_last + storage.keep_best + 2)
    return DiskNeeds(
        export=sum(BYTES[dtype] * parameters for parameters, _, dtype in policies),
        checkpoint=sum(CHECKPOINT_BYTES * trained for _, trained, _ in policies),
        shards=round(TRAJECTORY_BYTES * tokens),
        models=max(0, models),
        # A training has two of its own, in turn, beside those of the versions before.
        states=max(0, min(versions + 1, storage.keep_states + 2)),
    )
