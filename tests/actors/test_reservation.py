"""What a run starts with where there is not room for all of it. Ray's placement groups are stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from actors import reservation as module
from actors.reservation import reserve
from actors.session import ClusterError
from pipeline.core.config import ClusterConfig, LearnerConfig, ModelConfig, RetrieverConfig, RolloutConfig
from pipeline.core.policies import PolicySpec


class Group:
    def __init__(self, bundles: list[dict[str, float]], strategy: str) -> None:
        self.size = len(bundles)

    def wait(self, seconds: float) -> bool:
        return self.size <= 2


@pytest.fixture(autouse=True)
def removed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the groups that were given back. The cluster has 8 CPUs, and others use 6 of them."""
    sizes: list[int] = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(module, "placement_group", Group)
    monkeypatch.setattr(module, "remove_placement_group", lambda group: sizes.append(group.size))
    monkeypatch.setattr(module, "has_gpu_packages", lambda: False)
    return sizes


def reserved(**rollout: Any) -> tuple[RolloutConfig, int]:
    """What it starts with, and the size of the group."""
    spec = PolicySpec("a", ModelConfig(), RolloutConfig(**rollout), LearnerConfig())
    (found,), placement, group = reserve([spec], ClusterConfig(), RetrieverConfig())
    assert found.rollout is not None
    assert len(placement.policies["a"].engine_bundles) == found.rollout.workers
    return found.rollout, group.size  # type: ignore[attr-defined]


def test_where_there_is_room_for_all_all_of_it_is_held(removed: list[int]) -> None:
    rollout, size = reserved(workers=2, max_workers=5)
    assert (rollout.workers, rollout.most_workers, size, removed) == (2, 5, 2, [])


def test_else_the_run_starts_with_the_fewest_and_grows_to_what_was_asked_for(
    removed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    rollout, size = reserved(workers=4)
    assert (rollout.workers, rollout.most_workers, size, removed) == (1, 4, 1, [4])
    assert "the run starts with rollout.min_workers" in caplog.text


def test_if_even_these_have_no_room_it_says_what_there_is(removed: list[int]) -> None:
    with pytest.raises(ClusterError, match=r"within 300 s .*it has 2 CPU, 0 GPU free of 8 CPU, 0 GPU"):
        reserved(workers=4, min_workers=3)
    assert removed == [4, 3]
