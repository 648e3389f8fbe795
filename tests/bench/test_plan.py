"""The plan against what `python -m bench.plan` measured (docs/results.md): a formula cannot drift away."""

from __future__ import annotations

import pytest

from bench.plan import ENGINE, RANKS, model_config
from pipeline.core.plan.engine import engine_needs
from pipeline.core.plan.learner import rank_memory
from pipeline.core.plan.shape import shape_of

MEASURED = {
    ("3M", "rank"): 749,
    ("3M", "rank, ZeRO-0"): 687,
    ("3M", "rank, checkpointing"): 612,
    ("3M", "rank, bfloat16, ZeRO-2"): 671,
    ("3M", "engine"): 2_326,
    ("60M", "rank"): 2_850,
    ("60M", "rank, ZeRO-0"): 2_576,
    ("60M", "rank, checkpointing"): 1_923,
    ("60M", "rank, bfloat16, ZeRO-2"): 2_229,
    ("60M", "engine"): 2_778,
    ("250M", "rank"): 8_371,
    ("250M", "engine"): 4_089,
}
"""MB at the peak."""


@pytest.mark.parametrize(("model", "process"), MEASURED)
def test_the_plan_is_within_a_tenth_of_what_was_measured(model: str, process: str) -> None:
    shape = shape_of(model_config(model))

    planned = (
        engine_needs(shape, ENGINE).memory if process == "engine" else rank_memory(shape, RANKS[process])
    )

    assert planned.on("host") / 1e6 == pytest.approx(MEASURED[model, process], rel=0.1)
