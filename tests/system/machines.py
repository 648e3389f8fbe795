"""Several Ray nodes on one machine, and what of a run lives on them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from typing import Any

import psutil
from ray.cluster_utils import Cluster


class Machines:
    """A head without room, and nodes that hold one engine and one learner rank each."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._start()

    def _start(self) -> None:
        # In a folder of its own (with a short path, for its sockets), or else runs without an address would join it.
        self._folder = tempfile.mkdtemp(prefix="ray-")
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": self._folder}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(self._nodes):
            self.add_node()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self) -> None:
        self._cluster.add_node(num_cpus=1)

    def close(self) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start_again(self) -> None:
        """The whole cluster, after the loss of its head."""
        self.close()
        self._start()

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of the run's actors whose class has this name, the oldest first."""
        found = [
            process
            for node in self._cluster.list_all_nodes()
            for process in _tree_of(node)
            if f"::{name}" in _name(process)
        ]
        return sorted(found, key=psutil.Process.create_time)

    def lose_node_of(self, pid: int) -> None:
        """That node is gone from one moment to the next; another one joins."""
        (node,) = (n for n in self._cluster.worker_nodes if pid in {process.pid for process in _tree_of(n)})
        kill(_tree_of(node))
        self._cluster.remove_node(node, allow_graceful=False)
        self.add_node()

    def lose_head(self) -> None:
        """The head is gone with all that was on it."""
        kill(_tree_of(self._cluster.head_node))


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, parents first, so that nothing is started again."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _tree_of(node: Any) -> list[psutil.Process]:
    """All that runs on a node of the cluster."""
    found: list[psutil.Process] = []
    for _, started in node.live_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += tree(psutil.Process(started.pid))
    return found


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
