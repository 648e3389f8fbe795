"""What an engine's processes read from the environment, and how much it computes at once. No engine is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors import engine_options as module
from actors.engine_options import EngineOptions, batched_tokens, set_environment
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


def test_compiled_kernels_stay_on_the_node_and_not_in_a_home_that_nodes_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    set_environment(EngineOptions("model"))

    caches = [Path(os.environ[name]) for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")]
    assert len(set(caches)) == 2
    assert all(cache.parent == tmp_path / f"exsearch-{os.getuid()}" for cache in caches)


def test_a_cache_that_the_user_chose_is_kept() -> None:
    os.environ["VLLM_CACHE_ROOT"] = "/scratch/vllm"

    set_environment(EngineOptions("model"))

    assert os.environ["VLLM_CACHE_ROOT"] == "/scratch/vllm"


def test_a_step_on_gpus_takes_8192_tokens_and_on_cpus_the_longest_prompt() -> None:
    assert batched_tokens(32_768, 512, on_cpu=False) == 8_192
    assert batched_tokens(32_768, 128, on_cpu=True) == 32_768
    assert batched_tokens(1_024, 128, on_cpu=True) == 4_096
