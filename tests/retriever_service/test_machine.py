"""Cores and memory of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from retriever_service.machine import available_cores


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
