"""The growing context of one turn, and the trajectory that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.core.agents.program import Completion
from pipeline.core.records import Step, StopReason, Trajectory


@dataclass(slots=True)
class Transcript:
    """`append_*` are the only ways to change the ids, so one that is written stays."""

    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def append_environment(self, ids: Sequence[int]) -> None:
        """Text that the model did not write: context, never a target."""
        self.token_ids += ids
        self.loss_mask += [False] * len(ids)
        self.logprobs += [float("nan")] * len(ids)

    def append_model(self, completion: Completion) -> None:
        """What the model wrote, as it wrote it."""
        self.token_ids += completion.token_ids
        self.loss_mask += [True] * len(completion.token_ids)
        self.logprobs += completion.logprobs

    def refuse(self, first: int, end: int) -> None:
        """What the model wrote at these indices is context, and not trained."""
        self.loss_mask[first:end] = [False] * (end - first)

    def trajectory(
        self,
        *,
        question_id: str,
        sample: int,
        role: str,
        policy_version: int,
        stop_reason: StopReason,
        answer: str = "",
        answer_start: int | None = None,
        answer_opening: Sequence[int] = (),
        detail: str = "",
    ) -> Trajectory:
        """The record of this turn. `answer_start` None: there is no answer behind the ids."""
        return Trajectory(
            question_id=question_id,
            sample=sample,
            role=role,
            policy_version=policy_version,
            token_ids=np.asarray(self.token_ids, dtype=np.int32),
            loss_mask=np.asarray(self.loss_mask, dtype=np.bool_),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            answer_start=len(self.token_ids) if answer_start is None else answer_start,
            steps=tuple(self.steps),
            answer=answer,
            stop_reason=stop_reason,
            detail=detail,
            answer_opening=tuple(answer_opening),
        )
