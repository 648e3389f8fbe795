"""What an engine's processes read from the environment. No engine is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actors.engine_options import EngineOptions, batched_tokens, set_environment


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is here, without what this is about; put back afterwards."""
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "away")
        os.environ.pop(name)


def test_compiled_kernels_stay_on_the_node_and_not_in_a_home_that_nodes_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    set_environment(EngineOptions("model"))

    caches = [Path(os.environ[name]) for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR")]
    assert len(set(caches)) == 2
    assert all(cache.parent == tmp_path / f"exsearch-{os.getuid()}" for cache in caches)


def test_a_cache_that_the_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/scratch/vllm")

    set_environment(EngineOptions("model"))

    assert os.environ["VLLM_CACHE_ROOT"] == "/scratch/vllm"


def test_a_step_on_gpus_takes_8192_tokens_and_on_cpus_the_longest_prompt() -> None:
    assert batched_tokens(32_768, 512, on_cpu=False) == 8_192
    assert batched_tokens(32_768, 128, on_cpu=True) == 32_768
    assert batched_tokens(1_024, 128, on_cpu=True) == 4_096
