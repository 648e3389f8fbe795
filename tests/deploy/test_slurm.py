"""The batch script for SLURM on two nodes that are this machine; `srun` and `scontrol` are stand-ins of a few lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from retriever_service.encoding.vectors import VectorStore
from tests.system.ray_start import HEAD, ROOT, WORKER, free_ports

pytestmark = [pytest.mark.component, pytest.mark.chaos, pytest.mark.timeout(900)]

SRUN = """#!/usr/bin/env bash
# Runs the command here, as the node that is asked for.
while [[ $1 == --* ]]; do
  [[ $1 == --nodelist=* ]] && node=${1#*=}
  shift
done
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
exec "$@" --node-ip-address "$node" --num-cpus 1 --object-store-memory 100000000 \\
  --dashboard-agent-listen-port "$port" --temp-dir "$RAY_TMPDIR-$node"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then
  tr , '\\n' <<<"$3"
else
  echo "$@" >>"$SCONTROL_LOG"
fi
"""


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a batch script."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="exs-", dir="/tmp") as short:
        yield {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "HOME": str(tmp_path),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RAY_PORT": str(port),
            "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": f"{HEAD},{WORKER}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "TMPDIR": short,
        }


def test_a_run_that_is_near_its_time_limit_queues_itself_again_and_goes_on(
    allocation: dict[str, str], tmp_path: Path
) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "vectors"
    rows = [{"id": f"p{i}", "title": "", "text": f"Passage number {i}. " * 20} for i in range(100)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["index", "encode-with-ray", "--corpus", str(corpus), "--out", str(out)]
    requeued = Path(allocation["SCONTROL_LOG"])

    job = start(words, allocation)
    deadline = time.monotonic() + 300
    while not out.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.05)
    started = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 143, said
    assert "go on with: python -m pipeline.cli index encode-with-ray" in said
    assert requeued.read_text() == "requeue 17\n"
    _, alive = psutil.wait_procs(started, timeout=30)
    assert [" ".join(process.cmdline()) for process in alive] == []

    job = start(words, allocation)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said
    assert VectorStore.open(out).manifest.count == 100
    assert requeued.read_text() == "requeue 17\n"


def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", ROOT / "deploy/slurm/exsearch.sbatch", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
