"""A run with a copy on an S3 server loses its machine, and goes on from the copy as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.core.mirror.manifest import read_manifest
from pipeline.core.mirror.store import Store
from tests.system.conftest import overrides, random_model
from tests.system.processes import finish, kill_when
from tests.system.test_resume import step_when_at_rest

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.timeout(1800)]


def test_a_run_whose_machine_is_lost_in_the_m_step_goes_on_from_its_copy(
    world: Path, index: Path, tmp_path: Path, s3: str
) -> None:
    settings = overrides(world, index, random_model(tmp_path / "model", "Qwen2"))
    # Training goes on for longer than the copy may be behind.
    settings += ["learner.batch_size=1", "learner.epochs=40", "rollout.questions_per_shard=2"]
    undisturbed, lost = tmp_path / "undisturbed", tmp_path / "lost"
    finish(undisturbed, settings)

    def has_a_checkpoint() -> bool:
        manifest = read_manifest(Store(s3))
        return manifest is not None and "iterations/0001/searcher/learner/checkpoint.json" in manifest.files

    here = [*settings, f"storage.url={s3}", "learner.checkpoint_minutes=0.05"]
    kill_when(lost, here, has_a_checkpoint)
    step_when_at_rest(lost / "iterations/0001/searcher/learner/checkpoint.json")
    assert not (lost / "iterations/0001/searcher/train.json").exists()
    shutil.rmtree(lost)
    finish(lost, [*settings, f"storage.url={s3}"])

    log = (lost / "run.log").read_text()
    assert f"files restored from {s3}" in log
    trained = json.loads((lost / "iterations/0001/searcher/train.json").read_text())
    assert 0 < trained["resumed_at"] < trained["steps"]
    weights = (
        load_file(run / "iterations/0001/searcher/model/model.safetensors") for run in (lost, undisturbed)
    )
    for mine, other in zip(*(sorted(found.items()) for found in weights), strict=True):
        np.testing.assert_allclose(mine[1], other[1], atol=1e-5)
    manifest = read_manifest(Store(s3))
    assert manifest is not None
    assert {"report.json", "iterations/0001/DONE", "test/best.json"} <= manifest.files.keys()
    state = json.loads((lost / "mirror.json").read_text())
    assert (state["behind"], state["last_error"]) == (0, None)
