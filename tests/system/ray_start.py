"""A real Ray cluster of two nodes on loopback, started by the scripts of deploy/, and jobs on it by `ray job`."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
"""Not 127.0.0.1, which Ray takes for the machine's outer address."""
DEADLINE_S = 900
OPTIONS = ("--block", "--num-cpus", "1", "--object-store-memory", "100000000")


@dataclass(frozen=True)
class Nodes:
    """A running cluster. Commands see it as somebody's shell would: an address of the job server, a token file."""

    environment: dict[str, str]
    processes: Sequence[subprocess.Popen[bytes]]

    def ray(self, *words: str) -> str:
        """What `ray WORDS` prints on both streams.

        Raises:
            AssertionError: it failed.
        """
        result = subprocess.run(
            [ROOT / ".venv/bin/ray", *words],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-4000:]
        return result.stdout

    def listed(self, kind: str) -> list[dict[str, Any]]:
        """Rows of `ray list`: actors, nodes, placement-groups."""
        out = self.ray("list", kind, "--format", "json", "--detail", "--limit", "1000")
        if out == "No resource in the cluster\n":
            return []
        return json.loads(out[out.index("[") :])  # type: ignore[no-any-return]

    def job_status(self, job: str) -> str:
        return next(row["status"] for row in self.listed("jobs") if row["submission_id"] == job)

    def below(self) -> set[psutil.Process]:
        """All processes that the nodes have started, those of jobs among them."""
        return {
            child
            for node in self.processes
            if node.poll() is None
            for child in psutil.Process(node.pid).children(recursive=True)
        }


def shared_memory(processes: set[psutil.Process]) -> set[Path]:
    """Files of /dev/shm that one of the processes has mapped."""
    names: set[Path] = set()
    for process in processes:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        except OSError:
            continue  # ended meanwhile
        names |= {Path(line.split()[5]) for line in maps.splitlines() if " /dev/shm/" in line}
    return {name for name in names if name.exists()}


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """A head and a worker node with one CPU each; their own processes end them."""
    folder = Path(tempfile.mkdtemp(prefix="exs-", dir="/tmp"))  # short: the names of sockets are bounded
    port, dashboard, client, *agents = free_ports(5)
    taken = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment |= {"TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    # Each machine has a home of its own, the second one a copy of the first one's token.
    first, second = ({**environment, "HOME": str(folder / home)} for home in ("home-1", "home-2"))
    processes: list[subprocess.Popen[bytes]] = []

    def start(script: str, *words: str, home: dict[str, str]) -> None:
        with (folder / f"{script}.log").open("wb") as log:
            command = [ROOT / "deploy/ray-start" / script, *words, *OPTIONS]
            processes.append(subprocess.Popen(command, env=home, stdout=log, stderr=subprocess.STDOUT))

    nodes = Nodes(
        {**second, "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"},
        processes,
    )
    try:
        start(
            "head.sh",
            *("--node-ip-address", HEAD, "--port", str(port), "--ray-client-server-port", str(client)),
            *("--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agents[0])),
            *("--temp-dir", str(folder / "a")),
            home=first,
        )
        # The agent starts last, and jobs need it.
        await_(lambda: listens(HEAD, agents[0]) and listens("127.0.0.1", dashboard), nodes)
        shutil.copytree(folder / "home-1/.ray", folder / "home-2/.ray")
        start(
            "worker.sh",
            f"{HEAD}:{port}",
            *("--node-ip-address", WORKER, "--temp-dir", str(folder / "b")),
            *("--dashboard-agent-listen-port", str(agents[1])),
            home=second,
        )
        await_(lambda: sum(row["state"] == "ALIVE" for row in nodes.listed("nodes")) == 2, nodes)
        yield nodes
    finally:
        started = nodes.below()
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=60)
        _, alive = psutil.wait_procs(started, timeout=60)
        for left in alive:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)
    assert alive == []


def await_(reached: Callable[[], bool], nodes: Nodes) -> None:
    """Wait for something while the nodes live."""
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert all(process.poll() is None for process in nodes.processes), "a node ended by itself"
        assert time.monotonic() < deadline, "did not get there in time"
        time.sleep(0.05)


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    """Below those that the system gives to whoever asks for any: they are free for longer than a moment."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            ports.add(port)
    return list(ports)
