"""What an engine's processes read from the environment."""

from __future__ import annotations

import os

import pytest

from actors import engine_options as module
from actors.engine_options import EngineOptions, set_environment
from actors.placement import PolicyPlacement
from actors.pool import engine_options
from pipeline.core.config import ClusterConfig, ModelConfig, RolloutConfig
from pipeline.core.policies import PolicySpec


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node with 24 cores."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(module, "available_cores", lambda: 24)


def options(*, on_cpu: bool) -> EngineOptions:
    """Of a pool whose driver knows nothing of the nodes' cores."""
    return engine_options(
        PolicySpec("a", ModelConfig(path="model"), RolloutConfig(), None),
        PolicyPlacement("shared_memory", [0], [], 0.0, 0.0, 0.0),
        ClusterConfig(),
        on_cpu=on_cpu,
        engines_per_node=3,
        sleeps=False,
    )


def test_on_cpus_an_engine_takes_its_share_of_the_cores_of_its_own_node() -> None:
    set_environment(options(on_cpu=True))
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_on_gpus_threads_are_left_to_vllm() -> None:
    set_environment(options(on_cpu=False))
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_number_of_threads_that_is_named_is_taken() -> None:
    set_environment(EngineOptions("model", num_threads=5, engines_per_node=3))
    assert os.environ["OMP_NUM_THREADS"] == "5"
