"""A run whose disk fills up, in sampling and in training, says so and goes on by the same command."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.system.conftest import overrides, random_model
from tests.system.processes import ended_by, finish
from tests.system.test_resume import history, sampled, scores, weights

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.timeout(1800)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 MB."""
    at = tmp_path / "disk"
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(at)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield at
    subprocess.run(["umount", "--lazy", str(at)], check=True)


def fails_when(run: Path, settings: list[str], reached: Callable[[], bool]) -> str:
    """Start the command, fill the disk as soon as `reached` says so; its last words. Then there is room again."""
    ballast = run.parent / "ballast"

    def fill(_: object) -> None:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    returned, said = ended_by(run, settings, reached, fill)
    ballast.unlink()
    assert returned == 2
    assert "Traceback" not in "\n".join(said)
    return said[-1]


def test_a_run_whose_disk_fills_up_says_so_and_goes_on_when_there_is_room(
    world: Path, index: Path, tmp_path: Path, disk: Path
) -> None:
    settings = overrides(world, index, random_model(tmp_path / "model", "Qwen2"))
    settings += ["rollout.questions_per_shard=1", "rollout.concurrency=2", "weighting=uniform"]
    settings += ["learner.batch_size=1", "learner.epochs=4", "learner.checkpoint_minutes=1e-9"]
    undisturbed, run = tmp_path / "undisturbed", disk / "run"
    finish(undisturbed, settings)

    said = fails_when(run, settings, (run / "iterations/0001/rollouts/_000000.json").exists)
    assert said.startswith("error: ") and "the disk is full; make room and run the same command again" in said
    said = fails_when(run, settings, (run / "iterations/0001/searcher/learner/checkpoint.json").exists)
    assert said.startswith("error: ") and "the checkpoint of optimiser step" in said
    finish(run, settings)

    assert sampled(run) == sampled(undisturbed)
    assert history(run) == history(undisturbed)
    assert scores(run) == scores(undisturbed)
    for name, tensor in weights(undisturbed).items():
        np.testing.assert_array_equal(weights(run)[name], tensor)
