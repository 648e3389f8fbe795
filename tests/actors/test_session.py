"""What actors on CPUs find in their environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.session import cpu_environment

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


@pytest.mark.component
def test_what_an_actor_frees_goes_back_to_the_machine_while_it_does_nothing() -> None:
    output = subprocess.check_output(
        [sys.executable, "-c", FREES], env=os.environ | cpu_environment(), text=True, timeout=100
    )

    most, held = map(int, output.split())
    assert most > 350
    assert held < 0.2 * most


def test_an_allocator_that_the_user_preloads_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/libtcmalloc.so")

    first, ours = cpu_environment()["LD_PRELOAD"].split(":")

    assert first == "/opt/libtcmalloc.so"
    assert Path(ours).exists()


def test_settings_of_jemalloc_are_the_users_if_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:0")

    assert cpu_environment()["MALLOC_CONF"] == "dirty_decay_ms:0"
