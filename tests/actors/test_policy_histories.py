"""Whatever is done with policies, in whatever order: what they train on, serve and save is the version that they are.

Learners, engines and disks are stand-ins that hold weights as text; an M-step appends its number to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError

from actors import policy as module
from actors.placement import PolicyPlacement
from actors.policy import Policy, Turns
from actors.weight_transfer import EngineRef, PushReport, WeightTransferError
from pipeline.core.config import LearnerConfig, ModelConfig, RolloutConfig
from pipeline.core.policies import PolicySpec, Snapshot

PLACEMENT = PolicyPlacement("shared_memory", [0], [0], 0.0, 0.0, 0.0)


@dataclass
class World:
    """What lies on disk, and who is at work."""

    disk: dict[str, str] = field(default_factory=dict)
    steps: Iterator[int] = field(default_factory=itertools.count)
    learners: list[Learner] = field(default_factory=list)
    push_fails: Exception | None = None
    """How the next push ends."""


class Learner:
    """A learner group."""

    world: World

    def __init__(self, config: Any, model: str, *, state: Path | None, **options: Any) -> None:
        self.weights = self.world.disk[model if state is None else str(state)]
        self.world.learners.append(self)

    def train(self, shards: Any, loss: Any, **options: Any) -> str:
        self.weights += f" {next(self.world.steps)}"
        return self.weights

    def save(self, state: Path, model: Path) -> None:
        self.world.disk[str(state)] = self.world.disk[str(model)] = self.weights

    def push(
        self, receivers: Sequence[EngineRef], transport: Any, version: int, **options: Any
    ) -> PushReport:
        fails, self.world.push_fails = self.world.push_fails, None
        for receiver in receivers:
            receiver.handle.weights = "half of it" if fails else self.weights
        if fails:
            raise fails
        return PushReport(version, "digest", 0, 0, 0.0)

    def rest(self) -> None:
        pass

    def close(self) -> None:
        self.world.learners.remove(self)


class Pool:
    """Engines; while they sleep they hold no weights."""

    def __init__(self, world: World, snapshot: Snapshot) -> None:
        self.world, self.serving = world, None
        self.reload(snapshot)

    def must_be_idle(self, why: str) -> None:
        pass

    def sleep(self) -> None:
        self.serving = self.weights = None

    def reload(self, snapshot: Snapshot) -> None:
        self.weights: str | None = self.world.disk[snapshot.model]
        self.now_serves(snapshot)

    def now_serves(self, snapshot: Snapshot) -> None:
        self.serving: int | None = snapshot.version

    def lose_silent(self) -> None:
        pass

    def receivers(self) -> list[EngineRef]:
        return [EngineRef(self, "node")]

    def close(self) -> None:
        pass


class Run:
    """Two policies that take turns or not, and every version that they were."""

    def __init__(self, world: World, turns: Turns) -> None:
        self.world = world
        self.versions = [self._first("one"), self._first("other")]
        self.pools = [Pool(world, versions[0]) for versions in self.versions]
        self.policies = [
            Policy(
                PolicySpec(name, ModelConfig(path=f"{name}-0"), RolloutConfig(), LearnerConfig()),
                versions[0],
                pool,  # type: ignore[arg-type]
                placement=PLACEMENT,
                rank_options=[{}],
                turns=turns,
                push_timeout_s=1.0,
            )
            for name, versions, pool in zip(("one", "other"), self.versions, self.pools, strict=True)
        ]

    def _first(self, name: str) -> list[Snapshot]:
        self.world.disk[f"{name}-0"] = name
        return [Snapshot(0, f"{name}-0")]

    def train_and_save(self, who: int) -> None:
        policy, before = self.policies[who], self.weights_of(who)
        trained: Any = policy.train([], None, state=Path("state"), seed=0)  # type: ignore[arg-type]
        assert trained.rpartition(" ")[0] == before
        version = len(self.versions[who])
        at = f"{policy.name}-{version}"
        snapshot = policy.save(version, state=Path(f"{at}-state"), model=Path(at))
        self.versions[who].append(snapshot)
        assert self.weights_of(who) == trained

    def restore(self, who: int, version: int) -> None:
        self.policies[who].restore(self.versions[who][version % len(self.versions[who])])

    def push(self, who: int) -> None:
        self.policies[who].push()
        assert self.pools[who].weights == self.weights_of(who)
        assert self.policies[who].push() is None

    def push_that_fails(self, who: int) -> None:
        self.world.push_fails = WeightTransferError("no engine confirmed")
        self.push(who)
        self.world.push_fails = None

    def push_in_which_the_learner_dies(self, who: int) -> None:
        self.world.push_fails = RayActorError()
        self.push(who)
        self.world.push_fails = None

    def weights_of(self, who: int) -> str:
        """Of the version that a policy is."""
        return self.world.disk[self.policies[who].current.model]


ACTS = ["train_and_save", "restore", "push", "push_that_fails", "push_in_which_the_learner_dies"]
acts = st.tuples(st.sampled_from(ACTS), st.integers(0, 1), st.integers(0, 5))


@pytest.mark.parametrize("park_on_disk", [False, True])
@pytest.mark.parametrize("take_turns", [False, True])
@settings(max_examples=60)
@given(history=st.lists(acts, max_size=12))
def test_in_any_order_a_policy_serves_and_trains_the_version_that_it_is(
    take_turns: bool, park_on_disk: bool, history: list[tuple[str, int, int]]
) -> None:
    world = World()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LearnerGroup", type("LearnerOfThisWorld", (Learner,), {"world": world}))
        run = Run(world, Turns(take_turns=take_turns, park_on_disk=park_on_disk))
        for act, who, version in history:
            if act == "restore":
                run.restore(who, version)
            else:
                getattr(run, act)(who)
            assert len(world.learners) <= (1 if park_on_disk else 2)
        for policy in run.policies:
            policy.close()
        assert world.learners == []
