"""The connection to Ray, bounded waits on it, and what its machines have."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors import allocator
from actors.preflight import check_address, check_nodes, cluster_address
from pipeline.core.config import ClusterConfig
from pipeline.core.errors import RunError
from pipeline.core.packages import has_gpu_packages
from pipeline.core.preflight import check_machine
from retriever_service.interrupts import Interrupted

logger = logging.getLogger(__name__)


def cpu_environment() -> dict[str, str]:
    """For actors that compute on CPUs, beside this process' own environment.

    They share the cores, so a thread that waits must not spin, but for the microseconds between two products of its
    team, in which it could not be put to sleep and woken. And they allocate by jemalloc, which Ray brings along:
    glibc either gives each large tensor back to the kernel and faults it in again, which takes more time than the
    arithmetic of a small model, or keeps what does not fit together again, so that a process grows from step to step
    (`bench.plan --allocators`). An allocator that is preloaded already comes first.
    """
    library = Path(ray.__file__).parent / "core/libjemalloc.so"
    preloaded = [os.environ.get("LD_PRELOAD"), str(library) if library.exists() else None]
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        "LD_PRELOAD": ":".join(filter(None, preloaded)),
        "MALLOC_CONF": os.environ.get("MALLOC_CONF", allocator.SETTINGS),
    }


def actor_environment(*, on_gpu: bool) -> dict[str, str]:
    """For an actor, beside this process' own environment.

    On a GPU it does not preload jemalloc: its large tensors are CUDA's to allocate, and the library would come into all
    that it starts, compilers included. But what it computes on CPUs, such as an offloaded optimiser, shares the cores
    of its node as well.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE"} if on_gpu else cpu_environment()


class ClusterError(RunError):
    """The cluster could not do what was asked: something died too often, or did not come up in time."""


@contextmanager
def ray_session(config: ClusterConfig, say: Callable[[str], None] = logger.info) -> Iterator[None]:
    """Connect to the configured cluster, or start a local one, for the duration; an open connection is left alone.

    Args:
        say: told which cluster is joined, and what named it: it may be one that nobody thinks of any more.

    Raises:
        UserError: this machine, the address or a node of the cluster is not fit for a run.
    """
    if ray.is_initialized():
        yield
        return
    cluster = cluster_address(config.address)
    check_machine(starts_ray=cluster is None, on_gpus=has_gpu_packages())
    if cluster is not None:
        check_address(*cluster)
        say(f"joining the Ray cluster at {cluster[0]}, which {cluster[1]} names")
    # It announces Ray's new default, token authentication, at every start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        with _keeping_sigterm():
            ray.init(
                address=cluster[0] if cluster else "local",
                include_dashboard=None if cluster else False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        if cluster is not None:
            check_nodes()
        yield
    finally:
        ray.shutdown()


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """What SIGTERM did before `ray.init`, it does afterwards.

    Ray has it exit the interpreter meanwhile, and then its C++ part takes it over: that prints a stack trace and aborts
    the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise Interrupted(signal.SIGTERM) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def actor_logs() -> str:
    """Folder of the actors' logs on this node; other nodes have theirs under the same name."""
    return str(ray._private.worker.global_worker.node.get_logs_dir_path())


def wait_for(references: Sequence[Any], timeout_s: float, what: str) -> list[Any]:
    """The results of all.

    Raises:
        ClusterError: they did not come in time; it says what was waited for and what the cluster has free.
    """
    try:
        return list(ray.get(list(references), timeout=timeout_s))
    except GetTimeoutError as error:
        raise ClusterError(
            f"waited {timeout_s:.0f} s for {what}; the cluster has {resources_in_words()}"
        ) from error


def outcomes(calls: Sequence[Any], timeout_s: float) -> list[Any]:
    """What came of each call: its result, or the `RayError` in its place (`GetTimeoutError`: not ended in time)."""
    if calls:
        ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    return [_outcome(call) for call in calls]


def _outcome(call: Any) -> Any:
    try:
        return ray.get(call, timeout=0)
    except RayError as error:
        return error


def resources_in_words() -> str:
    """What the cluster has in all and what is free of it."""
    free, total = _amounts(ray.available_resources()), _amounts(ray.cluster_resources())
    return f"{free} free of {total}"


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def count_devices() -> int:
    """GPUs of the connected cluster if they can be used, else its CPUs."""
    resources = ray.cluster_resources()
    return (has_gpu_packages() and int(resources.get("GPU", 0))) or int(resources.get("CPU", 0))
