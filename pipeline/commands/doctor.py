"""What is installed here, what this machine has, and what of it will not do."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal, get_args

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.core import shipped
from pipeline.core.errors import UserError
from pipeline.core.packages import has_gpu_packages, how_to_install
from pipeline.core.plan.machine import core_tflops, this_machine
from pipeline.core.plan.memory import Dtype, gib
from pipeline.core.preflight import check_machine
from pipeline.core.run import Json
from retriever_service.imports import quick_imports

PROGRAM = "exsearch"
DEVICES: tuple[Literal["cpu", "gpu"], ...] = ("cpu", "gpu")
"""Extras of which exactly one is to be installed."""
_FOR_DEVELOPERS = "dev"


@dataclass(frozen=True, slots=True)
class Package:
    """A package that the program names. `extra` is empty where it is always needed; `found` is None where it is not
    installed."""

    name: str
    wanted: str
    extra: str
    found: str | None

    @property
    def fits(self) -> bool:
        return self.found is not None and SpecifierSet(self.wanted).contains(self.found, prereleases=True)


def doctor() -> Json:
    """Everything, ready for JSON.

    Returns:
        program    its version
        packages   [{name, wanted, extra, found}]
        machine    what this machine has
        problems   in words, what keeps runs from working here; none is the aim
    """
    packages = named_packages()
    problems = [*missing(packages)]
    machine: Json = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    }
    if any(package.name == "torch" and package.found for package in packages):
        with quick_imports():
            (here,) = this_machine()
            speeds = {name: core_tflops(name) for name in get_args(Dtype)}
        machine |= {"memory": here.memory, "gpus": here.gpus, "gpu_memory": here.gpu_memory}
        machine["core_gflops"] = {name: round(1000 * speed, 1) for name, speed in speeds.items()}
        if has_gpu_packages() and not here.gpus:
            problems.append(
                "the packages are those for GPUs, and no GPU is seen (nvidia-smi, CUDA_VISIBLE_DEVICES); the others "
                f"are installed by: {how_to_install('cpu')}"
            )
        try:
            check_machine(starts_ray=True, on_gpus=has_gpu_packages())
        except UserError as error:
            problems.append(str(error))
    return {
        "program": version(PROGRAM),
        "packages": [asdict(package) for package in packages],
        "machine": machine,
        "problems": problems,
    }


def named_packages() -> list[Package]:
    """Those that the program requires, and those of its extras but the developers'."""
    found = []
    for text in requires(PROGRAM) or []:
        requirement = Requirement(text)
        extra = next((e for e in _extras() if _is_of(requirement, e)), "")
        if extra != _FOR_DEVELOPERS:
            found.append(
                Package(requirement.name, str(requirement.specifier), extra, _found(requirement.name))
            )
    return found


def missing(packages: Sequence[Package]) -> Iterator[str]:
    """In words, what of the packages will not do."""
    for package in packages:
        if package.found is None and not package.extra:
            yield f"{package.name} is not installed ({package.name}{package.wanted}); {_mend(package)}"
        elif package.found is not None and not package.fits:
            yield (
                f"{package.name} {package.found} is installed, and {package.name}{package.wanted} is needed; "
                f"{_mend(package)}"
            )
    whole = [
        device
        for device in DEVICES
        if all(package.found is not None for package in packages if package.extra == device)
    ]
    if len(whole) != 1:
        both = " and ".join(f"{PROGRAM}[{device}]" for device in DEVICES)
        ways = "; or ".join(how_to_install(device) for device in DEVICES)
        yield f"of {both} {'both are' if whole else 'neither is whole'} installed; install one of them: {ways}"


def _mend(package: Package) -> str:
    if shipped.IS_CHECKOUT:
        return "make --always-make setup installs it"
    return f"pip install '{package.name}{package.wanted}' installs it"


def in_words(found: Json) -> Iterator[str]:
    """Lines for a person."""
    machine = found["machine"]
    yield f"{PROGRAM} {found['program']}, Python {machine['python']}, {machine['system']}"
    memory = f", {gib(machine['memory'])} memory" if "memory" in machine else ""
    gpus = f", {machine['gpus']} GPUs of {gib(machine['gpu_memory'])}" if machine.get("gpus") else ", no GPU"
    yield f"{machine['cores']} cores{memory}{gpus}, {gib(machine['disk_free'])} free on the disk"
    if speeds := machine.get("core_gflops"):
        said = ", ".join(f"{name} {speed:,.1f}" for name, speed in speeds.items())
        yield f"a core multiplies, in GFLOP/s: {said}"
    yield f"/dev/shm {gib(machine['shared_memory'])}, open files up to {machine['open_files']:,}"
    groups: dict[str, list[str]] = {}
    for package in found["packages"]:
        groups.setdefault(package["extra"], []).append(
            f"{package['name']} {package['found'] or 'not installed'}"
        )
    for extra, names in groups.items():
        yield f"{f'{PROGRAM}[{extra}]' if extra else 'packages'}: {', '.join(names)}"
    yield from (f"problem: {problem}" for problem in found["problems"])
    if not found["problems"]:
        yield "nothing is missing"


def _extras() -> list[str]:
    return metadata(PROGRAM).get_all("Provides-Extra") or []


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})


def _found(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
