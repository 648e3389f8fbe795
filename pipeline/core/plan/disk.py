"""What a run writes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.plan.memory import BYTES, Dtype

CHECKPOINT_BYTES = 12
"""Of a trained parameter: weight and Adam's two moments, in float32 (`learner_state`)."""
TRAJECTORY_BYTES = 18
"""Per token of a trajectory and of its training example, before compression."""


@dataclass(frozen=True, slots=True)
class DiskNeeds:
    """Bytes that a run writes, of all its policies.

    Attributes:
        export: of one version: a model directory. All stay.
        checkpoint: of one version. Two are there while one is written.
        shards: trajectories and training examples of all iterations, at most.
        versions: that are trained.
    """

    export: int
    checkpoint: int
    shards: int
    versions: int

    @property
    def next_version(self) -> int:
        """Room without which the next training cannot end."""
        return self.export + self.checkpoint

    @property
    def whole_run(self) -> int:
        return self.versions * self.export + 2 * self.checkpoint + self.shards


def disk_needs(policies: list[tuple[int, int, Dtype]], *, versions: int, tokens: float) -> DiskNeeds:
    """
    Args:
        policies: of each that is trained: its parameters, how many of them are trained, the learner's number format.
        tokens: of all trajectories.
    """
    return DiskNeeds(
        export=sum(BYTES[dtype] * parameters for parameters, _, dtype in policies),
        checkpoint=sum(CHECKPOINT_BYTES * trained for _, trained, _ in policies),
        shards=round(TRAJECTORY_BYTES * tokens),
        versions=max(0, versions),
    )
