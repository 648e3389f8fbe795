"""A run that is told to stop: it ends in order, says how to go on, and the same command does."""

from __future__ import annotations

import shlex
import signal
from operator import methodcaller
from pathlib import Path

import pytest

from pipeline.core.run import Json
from pipeline.core.status import run_status
from tests.system.conftest import overrides, random_model
from tests.system.processes import ended_by, finish

pytestmark = [pytest.mark.system, pytest.mark.chaos, pytest.mark.timeout(1800)]


STARTING = "starting"
IN_E_STEP, IN_M_STEP = "iterations/0001/rollouts", "iterations/0001/sample.json"
"""What is there first when a run has come so far."""
STOPS = {
    STARTING: (signal.SIGTERM, 143),
    IN_E_STEP: (signal.SIGTERM, 143),
    IN_M_STEP: (signal.SIGINT, 130),
}


def test_a_run_ends_in_order_at_a_signal_in_any_phase_and_goes_on(
    world: Path, index: Path, tmp_path: Path
) -> None:
    run, model = tmp_path / "run", random_model(tmp_path / "model", "Qwen2")
    settings = [
        *overrides(world, index, model),
        "cold_start.questions=0",
        "data.test=[]",
        "learner.num_ranks=1",
    ]

    def status() -> Json | None:
        return run_status(run) if (run / "config.yaml").exists() else None

    def is_starting_engines() -> bool:
        return "vLLM engines" in (((status() or {}).get("phase") or {}).get("name") or "")

    for phase, (number, code) in STOPS.items():
        reached = is_starting_engines if phase == STARTING else (run / phase).exists
        returned, said = ended_by(run, settings, reached, methodcaller("send_signal", number))
        assert returned == code, said
        *_, last = (line for line in said if line)
        go_on = shlex.join(["train", "--run", str(run), *settings])
        assert last == (
            f"error: interrupted by {number.name}; what was finished is kept, go on with: "
            f"python -m pipeline.cli {go_on}"
        )
        assert "Traceback" not in "\n".join(said)
        found = status()
        assert found is not None and found["state"] == "interrupted"

    finish(run, settings)
    found = status()
    assert found is not None
    assert (found["state"], found["starts"]) == ("finished", len(STOPS) + 1)
    assert found["iterations"] == {"finished": 1, "of": 1}
    assert set(found["steps"]) == {"0/evaluation", "1/sample", "1/searcher/train", "1/evaluation"}
