"""Stores to copy to: a folder, memory, and a real S3 server on this machine (tests/conftest.py)."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from pipeline.core.mirror import mirror


@pytest.fixture(params=["s3", "memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL with nothing under it."""
    if request.param == "s3":
        found: str = request.getfixturevalue("s3")
        return found
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/shared/run"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PERIOD_S", 0.05)
    monkeypatch.setattr(mirror, "MOST_PAUSE_S", 0.05)
    monkeypatch.setattr("pipeline.core.mirror.lease.LEASE_S", 0.3)
    monkeypatch.setattr("pipeline.core.mirror.lease.POLL_S", 0.05)
