"""Cores and memory of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retriever_service.machine import available_cores, total_memory


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("1600000 100000", 8)]
)
def test_the_quota_of_a_container_counts_and_so_does_what_the_process_is_bound_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert available_cores(tmp_path) == cores


def test_outside_of_a_container_all_cores_are_there_that_the_process_is_bound_to(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("limit", "memory"), [("max", 8 << 30), ("2147483648", 2 << 30), (f"{64 << 30}", 8 << 30)]
)
def test_the_limit_of_a_container_counts_if_it_is_less_than_the_machine_has(
    tmp_path: Path, limit: str, memory: int
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "meminfo").write_text("MemTotal:        8388608 kB\nMemAvailable:    1024 kB\n")
    assert total_memory(tmp_path / "meminfo", tmp_path) == memory


def test_outside_of_a_container_the_machine_has_its_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:        8388608 kB\n")
    assert total_memory(tmp_path / "meminfo", tmp_path / "nowhere") == 8 << 30
