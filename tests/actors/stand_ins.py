"""Actors in the places of engines, learner ranks, retrievers and weighting, which only say where they are.

Dozens of them share a machine: their processes import nothing but Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray


@dataclass(frozen=True)
class Place:
    """Where a process is: its node, and the GPUs that Ray lets it see."""

    node: str
    gpus: tuple[str, ...]


class _Placed:
    def place(self) -> Place:
        context = ray.get_runtime_context()
        return Place(str(context.get_node_id()), tuple(context.get_accelerator_ids()["GPU"]))


@ray.remote(num_cpus=0)
class _Engine(_Placed):
    def __init__(self) -> None:
        self.sleeps = 0

    def where(self) -> str:
        return self.place().node

    def start(self, model: str, version: int) -> int:
        return 100

    def sleep(self, timeout_s: float) -> None:
        self.sleeps += 1

    def slept(self) -> int:
        return self.sleeps

    def shutdown(self) -> None:
        pass


@ray.remote(num_cpus=0)
class _Rank(_Placed):
    def progress(self) -> dict[str, float]:
        return {"step": 0, "num_steps": 0, "resumed_at": 0}

    def train(self, *arguments: object, **options: object) -> Any:
        return SimpleNamespace(damaged_checkpoints=(), skipped_steps=0)


@ray.remote(num_cpus=0)
class _Other(_Placed):
    pass


@ray.remote(num_cpus=0)
class _Retriever(_Placed):
    def ready(self) -> None:
        pass

    def health(self) -> Any:
        return SimpleNamespace(process="one", in_hand_s=0.0)


class StandIns:
    """In place of an actor class: what the program asks of Ray is asked, what it tells the actor is noted.

    Args:
        kind: the actor that starts.
    """

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self.handles: list[Any] = []
        self.arguments: list[tuple[Any, ...]] = []
        self.keywords: list[dict[str, Any]] = []

    def options(self, **options: Any) -> Any:
        options.pop("max_concurrency", None)

        def remote(*arguments: Any, **keywords: Any) -> Any:
            self.arguments.append(arguments)
            self.keywords.append(keywords)
            self.handles.append(self._kind.options(**options).remote())
            return self.handles[-1]

        return SimpleNamespace(remote=remote)

    def places(self) -> list[Place]:
        """In the order in which they were asked for."""
        return list(ray.get([handle.place.remote() for handle in self.handles]))


def engines() -> StandIns:
    """In place of `actors.pool.RolloutActor`."""
    return StandIns(_Engine)


def ranks() -> StandIns:
    """In place of `actors.learner_group.LearnerRank`."""
    return StandIns(_Rank)


def retrievers() -> StandIns:
    """In place of `actors.retrievers.RetrieverActor`."""
    return StandIns(_Retriever)


def weighting() -> StandIns:
    """In place of `actors.weighting.WeightingActor`."""
    return StandIns(_Other)
