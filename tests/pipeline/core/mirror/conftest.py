"""Stores to copy to: a folder, memory, and a real S3 server on this machine (tests/conftest.py)."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest


@pytest.fixture(params=["s3", "memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL with nothing under it."""
    if request.param == "s3":
        found: str = request.getfixturevalue("s3")
        return found
    return f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/shared/run"
