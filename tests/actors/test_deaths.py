"""An actor that Ray's memory monitor has ended is as dead as any other, and people are told why in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError

from actors import learner_group
from actors.deaths import DEATHS, in_words
from actors.learner_group import LearnerError, LearnerGroup
from pipeline.core.config import LearnerConfig
from pipeline.core.errors import UserError

ROOM = 1 << 30
STEP = 64 << 20


@pytest.fixture
def full_node() -> Iterator[None]:
    """A Ray whose memory monitor leaves room for little more than is in use now."""
    memory = psutil.virtual_memory()
    threshold = 1 - (memory.available - ROOM) / memory.total
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
        _system_config={"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100},
    )
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Greedy:
    def take(self) -> None:
        held = []
        while True:
            held.append(b"x" * STEP)

    def ping(self) -> None:
        pass


@pytest.mark.component
def test_the_memory_monitor_is_named_and_what_shows_who_needs_how_much(full_node: None) -> None:
    actor = Greedy.remote()
    with pytest.raises(DEATHS) as death:
        ray.get(actor.take.remote(), timeout=120)
    with pytest.raises(DEATHS):
        ray.get(actor.ping.remote(), timeout=30)
    words = in_words(death.value)
    assert "Ray's memory monitor ended it" in words and "GB of " in words and "`exsearch plan`" in words
    assert "\n" not in words


def test_other_deaths_are_said_as_ray_does() -> None:
    assert isinstance(OutOfMemoryError("pages"), DEATHS) and isinstance(RayActorError(), DEATHS)
    assert in_words(OutOfMemoryError("pages")).startswith("Ray's memory monitor ended it")
    assert in_words(RayActorError(error_msg="it is gone")) == "it is gone"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("Trace\npipeline.core.errors.UserError: model.path: no\n\nsuch: x", UserError, "model.path: no\n\nsuch: x"),
        ("Trace\n  raise UserError: x\nValueError: UserError: y", LearnerError, "start: ValueError: UserError: y"),
        ("Trace\ntorch.OutOfMemoryError: CUDA", LearnerError, "a learner rank could not start: torch.Out"),
    ],
)  # fmt: skip
def test_what_a_rank_refuses_is_read_out_of_rays_text(text: str, kind: type, message: str) -> None:
    refusal = learner_group._refusal(RayActorError(error_msg=text))
    assert type(refusal) is kind
    assert message in str(refusal)


@ray.remote(num_cpus=0)
class FullRank:
    """A rank whose GPU is full."""

    def progress(self) -> dict[str, float]:
        return {"step": 0.0, "num_steps": 1.0, "resumed_at": 0.0}

    def train(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")


@pytest.fixture
def node() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.component
def test_a_rank_that_runs_out_of_gpu_memory_is_no_traceback(node: None) -> None:
    group = object.__new__(LearnerGroup)
    group.config, group.ranks, group._step = LearnerConfig(), [FullRank.remote()], -1.0
    with pytest.raises(UserError, match=r"^learner, in train: CUDA .*learner\.tokens_per_microbatch"):
        group._all("train")
