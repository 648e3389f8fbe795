"""The files of deploy/ without a cluster: scripts pass shellcheck, the manifest fits the schema, commands exist."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.runtime_env import RuntimeEnv

from tests.test_docs import check_command
from tests.test_packaging import locked_versions

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = [*sorted(DEPLOY.rglob("*.sh")), *sorted(DEPLOY.rglob("*.sbatch")), ROOT / ".ci/run"]
SCHEMA = yaml.safe_load(Path(__file__).with_name("rayjob-schema.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck_and_can_be_run(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run(
        [shellcheck, "--shell=bash", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout
    assert script.stat().st_mode & 0o111


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load((DEPLOY / "kubernetes/rayjob.yaml").read_text(encoding="utf-8"))


def test_the_manifest_fits_the_schema_of_rayjobs(manifest: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "runtimeEnv"), {}),
        (("spec", "rayClusterSpec", "rayVersion"), 2.6),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (
            ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "shm"),
            "1Gi",
        ),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else None,
)
def test_the_schema_refuses_what_kuberay_would_refuse(
    manifest: Any, path: tuple[str | int, ...], value: object
) -> None:
    broken = copy.deepcopy(manifest)
    *way, key = path
    place = broken
    for step in way:
        place = place[step]
    place[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_manifest_runs_a_command_that_exists_with_the_pinned_ray(manifest: Any) -> None:
    program, *words = shlex.split(manifest["spec"]["entrypoint"])
    assert program == "exsearch"
    check_command(words, where="rayjob.yaml")
    config = words[words.index("--config") + 1]
    assert (ROOT / Path(config).relative_to("/opt/exsearch")).is_file()
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == locked_versions("gpu")["ray"]


def test_jobs_of_both_kinds_have_a_valid_environment_and_time_to_end_in_order(manifest: Any) -> None:
    ours = yaml.safe_load((DEPLOY / "runtime-env.yaml").read_text(encoding="utf-8"))
    theirs = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])
    for environment in (ours, theirs):
        RuntimeEnv(**environment)
        assert int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_what_jobs_leave_at_home_is_not_needed_to_run() -> None:
    ours = yaml.safe_load((DEPLOY / "runtime-env.yaml").read_text(encoding="utf-8"))
    assert not {"/actors/", "/configs/", "/models/", "/pipeline/", "/retriever_service/"} & {
        *ours["excludes"]
    }


def test_the_image_is_made_of_files_that_exist_and_of_a_set_of_packages_that_does() -> None:
    text = (DEPLOY / "docker/Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    devices = re.findall(r"DEVICE=(\w+)", text)
    assert {*devices} == {"cpu", "gpu"}
    assert all((ROOT / f"requirements/{device}.txt").is_file() for device in devices)


def test_the_batch_script_runs_commands_that_exist() -> None:
    text = (DEPLOY / "slurm/exsearch.sbatch").read_text(encoding="utf-8")
    (words,) = re.findall(r"^#   sbatch \S+ (.+)", text, re.MULTILINE)
    check_command(shlex.split(words), where="exsearch.sbatch")
