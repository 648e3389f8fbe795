"""What would only fail later, looked at before anything is started: this machine, the models, the disk.

Each check refuses with one sentence and the mend (`UserError`), mends it itself, or warns and goes on.
"""

from __future__ import annotations

import getpass
import logging
import os
import resource
import shutil
import sysconfig
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from pipeline.core.config import StorageConfig
from pipeline.core.errors import UserError
from pipeline.core.models import CHECKSUMS, check_export, check_model, local_snapshot, model_size
from pipeline.core.plan.disk import CHECKPOINT_BYTES, disk_needs
from pipeline.core.plan.machine import core_tflops
from pipeline.core.plan.memory import Device, number_format
from pipeline.core.policies import PolicySpec
from retriever_service.imports import quick_imports

logger = logging.getLogger(__name__)

OPEN_FILES = 4096
"""As many as an actor's process may come to need: connections to all others, shards, mapped files."""
SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm below which there is a warning: containers have 64 MiB unless they are given more."""
SOCKET_PATH = 107
"""Longest name of a Unix socket, in bytes."""
_RAYS_SOCKET = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
_VLLMS_SOCKET = len("/00000000-0000-0000-0000-000000000000")
_UPLOADS = "working_dir_files"
"""The folder in which Ray unpacks the working directories of jobs."""


def check_machine(
    *,
    starts_ray: bool,
    on_gpus: bool = False,
    environment: MutableMapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> None:
    """This machine and this process, before Ray is started here or joined.

    Args:
        starts_ray: engines run here.
        on_gpus: the installed packages are those for GPUs.

    Raises:
        UserError: something that would fail later.
    """
    if starts_ray and on_gpus and (lacks := lacks_to_compile(environment)):
        raise UserError(lacks)
    _check_sockets(environment, starts_ray)
    _check_packages(cwd or Path.cwd())
    _raise_open_files()
    _give_the_user_a_name(environment)
    _ignore_foreign_vllm_port(environment)
    _look_at_shared_memory(Path("/dev/shm"))


def check_run(
    run: Path,
    policies: Sequence[PolicySpec],
    storage: StorageConfig,
    *,
    versions_to_come: int,
    tokens: int,
    device: Device,
) -> None:
    """What a run is about to read and write; also good for a run that goes on.

    Args:
        policies: of the run.
        storage: which models and checkpoints stay.
        versions_to_come: trained ones, of each policy.
        tokens: at most so many will be in the trajectories that are sampled.
        device: what it trains on.

    Raises:
        UserError: a model is incomplete or cannot be trained on packed rows, a package is missing, the run would not
            outlive its job, or the disk has no room for the next version. What is only slow is warned of.
    """
    if _UPLOADS in (whole := run.absolute()).parts:
        raise UserError(
            f"--run {run} is {whole} here, in the upload of this job, which Ray removes afterwards; give an absolute "
            "path on a file system that all nodes share"
        )
    check_models(spec.model.path for spec in policies)
    _check_attention(policies)
    if device == "cpu":
        _look_at_bfloat16(policies)
    _check_disk(run, policies, storage, versions_to_come, tokens, device)


def check_models(paths: Iterable[str]) -> None:
    """Model directories, and hub names that cannot be downloaded, are complete; those that a run exported, unchanged.

    Raises:
        UserError: one is not.
    """
    for path in paths:
        check_model(path)
        local_snapshot(path)
        if (Path(path) / CHECKSUMS).is_file():
            check_export(Path(path))


def _check_attention(policies: Sequence[PolicySpec]) -> None:
    needed = any(
        spec.learner is not None and spec.learner.attention == "flash_attention_2" for spec in policies
    )
    if needed and find_spec("flash_attn") is None:
        raise UserError(
            "learner.attention: flash_attention_2 needs the package flash-attn, which is not installed here; install "
            "it on all nodes (.venv/bin/pip install --no-build-isolation flash-attn, which needs nvcc), or leave "
            "learner.attention as it is (packed)"
        )
    # It needs torch and transformers, which take seconds to import.
    with quick_imports():
        from pipeline.core.attention_check import check_attention

    for spec in policies:
        if spec.learner is not None and spec.head != "embedding":
            check_attention(spec.model.path, spec.learner.attention)


def _look_at_bfloat16(policies: Sequence[PolicySpec]) -> None:
    """Processors without instructions for it convert each number on the way."""
    chosen = [
        f"{name}.dtype"
        for name in ("rollout", "learner")
        if any((part := getattr(spec, name)) is not None and part.dtype == "bfloat16" for spec in policies)
    ]
    if not chosen:
        return
    with quick_imports():
        bfloat16, float32 = core_tflops("bfloat16"), core_tflops("float32")
    if bfloat16 < float32:
        logger.warning(
            f"{' and '.join(chosen)}: bfloat16, which this processor multiplies {float32 / bfloat16:.1f} times as "
            "slowly as float32; float32 is faster here, and takes more memory (exsearch plan)"
        )


# ---------------------------------------------------------------- this machine


def _check_sockets(environment: Mapping[str, str], starts_ray: bool) -> None:
    """Names of sockets that vLLM and Ray will make."""
    made = [("TMPDIR", _VLLMS_SOCKET)]
    if starts_ray:
        made.append(("RAY_TMPDIR" if environment.get("RAY_TMPDIR") else "TMPDIR", _RAYS_SOCKET))
    for key, behind in made:
        folder = environment.get(key) or "/tmp"
        if (excess := len(os.fsencode(folder)) + behind - SOCKET_PATH) > 0:
            raise UserError(
                f"{key} is {folder}: {excess} bytes too long for the sockets that are made below it; set {key} to a "
                "shorter folder, such as /tmp"
            )


def lacks_to_compile(environment: Mapping[str, str], include: Path | None = None) -> str:
    """What keeps Triton, on which vLLM's model runner on GPUs is built, from compiling its kernels; "" if nothing does.

    Args:
        include: where the header files of Python are.
    """
    include = include or Path(sysconfig.get_paths()["include"])
    path = environment.get("PATH")
    if "CC" not in environment and not any(shutil.which(name, path=path) for name in ("gcc", "clang")):
        return (
            "there is no C compiler (gcc, clang or $CC), with which Triton compiles vLLM's kernels for GPUs; install "
            "one (Debian, Ubuntu: apt install gcc)"
        )
    if not (include / "Python.h").is_file():
        version = sysconfig.get_python_version()
        return (
            f"{include} has no Python.h, with which Triton compiles vLLM's kernels for GPUs; install the header files "
            f"of Python {version} (Debian, Ubuntu: apt install python{version}-dev), or take a Python that has "
            "them (in a checkout: make setup PYTHON=...)"
        )
    return ""


def _check_packages(cwd: Path) -> None:
    """Ray puts the working directory in front of everything that its workers import."""
    # Not `pipeline.__file__`: that may be theirs already, with ours found behind it.
    home = Path(__file__).resolve().parents[2]
    if cwd.resolve() == home:
        return
    for name in ("pipeline", "actors", "retriever_service"):
        if (cwd / name).is_dir() or (cwd / f"{name}.py").is_file():
            raise UserError(
                f"the working directory has a {name} of its own ({cwd / name}), which Ray's workers would import in "
                "place of ExSearch's; start the command in another directory"
            )


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        raise UserError(
            f"a process may open {hard} files here (ulimit -Hn), and a run needs {OPEN_FILES}; raise the limit, for a "
            "container with --ulimit nofile=65536"
        )
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _give_the_user_a_name(environment: MutableMapping[str, str]) -> None:
    """Containers run as users that no passwd file knows; torch names its caches after the user."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment["USER"] = f"uid{os.getuid()}"


def _ignore_foreign_vllm_port(environment: MutableMapping[str, str]) -> None:
    """Kubernetes tells every container the addresses of services; of one that is called vllm in this variable."""
    if "://" in environment.get("VLLM_PORT", ""):
        logger.warning(
            f"VLLM_PORT is {environment['VLLM_PORT']}, the address of a service and no port: it is ignored, since vLLM "
            "would refuse it (enableServiceLinks: false keeps Kubernetes from setting it)"
        )
        del environment["VLLM_PORT"]


def _look_at_shared_memory(shm: Path) -> None:
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    if size < SHARED_MEMORY:
        logger.warning(
            f"{shm} has {_gb(size)}: Ray's object store goes to the disk and is slow, and NCCL may fail; give the "
            "container more (--shm-size=8g, or an emptyDir with medium: Memory)"
        )


# ---------------------------------------------------------------- disk


def _check_disk(
    run: Path,
    policies: Sequence[PolicySpec],
    storage: StorageConfig,
    versions: int,
    tokens: int,
    device: Device,
) -> None:
    trained = []
    for spec in policies:
        if spec.learner is None:
            continue
        if (directory := local_snapshot(spec.model.path)) is None:
            logger.warning(
                f"{spec.model.path} is to be downloaded: whether the disk has room for it is not known"
            )
            return
        parameters = model_size(directory).parameters
        # Adapters are small beside what is exported.
        in_checkpoint = parameters if spec.learner.lora is None else 0
        trained.append((parameters, in_checkpoint, number_format(spec.learner.dtype, device)))
    if versions <= 0 or not trained:
        return
    needs = disk_needs(trained, storage, versions=versions, tokens=tokens)
    where = next(folder for folder in (run, *run.resolve().parents) if folder.exists())
    free = shutil.disk_usage(where).free
    checkpoint = f"{_gb(needs.checkpoint)} at {CHECKPOINT_BYTES} bytes a parameter"
    figures = f"exported {_gb(needs.export)}, checkpoint {checkpoint}"
    next_version = needs.next_version - _written_over(run)
    if free < next_version:
        raise UserError(
            f"{run}: the disk has {_gb(free)} free, and a training step writes {_gb(next_version)} more "
            f"({figures}); make room or choose another --run directory"
        )
    if free < needs.whole_run:
        logger.warning(
            f"{run}: the disk has {_gb(free)} free, and the run may come to {_gb(needs.whole_run)}: {needs.models} "
            f"models, {needs.states} checkpoints at a time ({figures}) and at most {_gb(needs.shards)} of trajectories"
        )


def _written_over(run: Path) -> int:
    """What lies in the run of a training that was cut off and makes room for what the next one writes, in bytes."""
    total = sum(map(_size, run.glob("iterations/*/*/.model.new")))
    for state in run.glob("iterations/*/*/learner"):
        slots = [_size(slot) for slot in state.iterdir() if slot.is_dir()]
        if len(slots) > 1 and not (state.parent / "train.json").exists():
            total += min(slots)
    return total


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
