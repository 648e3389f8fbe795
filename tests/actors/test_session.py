"""What actors on CPUs find in their environment."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors import cluster as cluster_module
from actors.cluster import Cluster
from actors.placement import Placement
from actors.session import actor_environment, cpu_environment
from pipeline.core.config import ClusterConfig, RetrieverConfig

FREES = """
import time
from pathlib import Path

def held() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) // 1024

before = held()
blocks = [b"x" * 100_000 for _ in range(4_000)]
most = held() - before
del blocks[::10]  # the end of the heap stays in use
kept = blocks[::20]
del blocks
deadline = time.monotonic() + 60
while held() - before > 0.2 * most and time.monotonic() < deadline:
    time.sleep(0.2)
print(most, held() - before)
"""


FAULTS = """
import resource
import torch
from actors.allocator import heed_settings

heed_settings()
torch.ones(4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(4 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def output_of(script: str) -> str:
    """As an actor on a CPU runs it."""
    environment = os.environ | cpu_environment()
    return subprocess.check_output([sys.executable, "-c", script], env=environment, text=True, timeout=100)


@pytest.mark.component
def test_what_an_actor_frees_goes_back_to_the_machine_while_it_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MALLOC_CONF", raising=False)

    most, held = map(int, output_of(FREES).split())
    assert most > 350
    assert held < 0.2 * most


def test_a_large_tensor_takes_the_memory_that_another_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_CONF", raising=False)

    assert int(output_of(FAULTS)) < (16 << 20) / mmap.PAGESIZE


def test_an_allocator_that_the_user_preloads_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/libtcmalloc.so")

    first, ours = cpu_environment()["LD_PRELOAD"].split(":")

    assert first == "/opt/libtcmalloc.so"
    assert Path(ours).exists()


def test_settings_of_jemalloc_are_the_users_if_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:0")

    assert cpu_environment()["MALLOC_CONF"] == "dirty_decay_ms:0"


def test_threads_that_wait_leave_their_core_to_others_on_gpu_nodes_too_and_the_allocator_stays_out() -> None:
    assert actor_environment(on_gpu=True) == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert actor_environment(on_gpu=False) == cpu_environment()
    assert cpu_environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    assert 0 < int(cpu_environment()["GOMP_SPINCOUNT"]) < 100_000


@pytest.mark.parametrize(("gpus", "of_retrievers"), [(0.0, False), (0.5, True)])
def test_every_actor_of_a_gpu_run_gets_the_environment_of_what_it_computes_on(
    monkeypatch: pytest.MonkeyPatch, gpus: float, of_retrievers: bool
) -> None:
    given: dict[str, Any] = {}
    placement = Placement("gpu", [], {}, take_turns=False)

    class Retrievers:
        def __init__(self, *arguments: object, **options: Any) -> None:
            given.update(options["runtime_env"]["env_vars"])

        def wait(self) -> None: ...

    monkeypatch.setattr(cluster_module, "reserve", lambda *sections: ([], placement, None))
    monkeypatch.setattr(cluster_module, "Retrievers", Retrievers)
    monkeypatch.setattr(cluster_module, "ShardSink", lambda *arguments, **options: None)
    made = Cluster([], ClusterConfig(), RetrieverConfig(gpus_per_replica=gpus), Path("index"))
    assert made._room(None, 1.0)["runtime_env"]["env_vars"] == actor_environment(on_gpu=True)
    assert given == actor_environment(on_gpu=of_retrievers)
