"""A 7B model on fewer GPUs than its configuration is made for: what fits, and what makes it fit."""

from __future__ import annotations

import pytest

from pipeline.core.plan.machine import gpu_nodes
from tests.actors.test_planning import ROOT, config, plan, qwen  # noqa: F401
from tests.pipeline.core.plan.shapes import in_gib

GPUS = (8, 4, 2, 1)
AT_ONCE = "cluster.take_turns=false"
OFFLOAD = "learner.offload_optimizer=true"
LORA = "learner.lora.rank=64"
TRAINING: dict[tuple[str, ...], tuple[int, int, int, int]] = {
    (): (34, 50, 82, 144),
    (LORA,): (20, 22, 27, 33),
    (OFFLOAD,): (20, 22, 25, 31),
    (OFFLOAD, "learner.offload_parameters=true"): (18, 18, 18, 16),
    (AT_ONCE,): (65, 81, 113, 175),
    (AT_ONCE, LORA): (51, 53, 57, 64),
    (AT_ONCE, OFFLOAD): (51, 53, 56, 61),
}
"""GiB of the GPU's 79.6 while the learner trains, by overrides, on 8, 4, 2 and 1 GPUs.

Of N ranks: 18F/N bytes of states (F = 7.6e9: 127.7/N GiB); 16 GiB of what a row needs, 14 where no layers are gathered;
and 2 of a sleeping engine, or 32.7 of one that is awake (0.4 of the GPU, and log-probabilities). Adapters leave 2F/N of
the states, as does an offloaded optimiser; offloaded parameters leave none.
"""


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("overrides", TRAINING, ids=lambda overrides: ",".join(overrides) or "as shipped")
def test_what_a_7b_model_needs_decides_whether_it_fits(
    overrides: tuple[str, ...],
    gpus: int,
    qwen: str,  # noqa: F811
) -> None:
    expected = TRAINING[overrides][GPUS.index(gpus)]
    sizes = (f"rollout.workers={gpus}", f"learner.num_ranks={gpus}")
    made = plan(config("qwen2.5-7b-8gpu.yaml", qwen, *sizes, *overrides), gpu_nodes(1, gpus, 79.6, None))

    training = made.gpus()[-1]
    assert in_gib(training.bytes) == pytest.approx(expected, rel=0.05)
    assert bool(made.refusals()) == (expected > 79.6)
    for line in made.refusals():
        assert "learner.offload_optimizer=true" in line


def test_the_same_table_is_in_the_documentation() -> None:
    rows = [
        f"| {', '.join(f'`{override}`' for override in overrides) or 'as it is'} | "
        + " | ".join(f"{size}{'' if size <= 79.6 else ': refused'}" for size in sizes)
        + " |"
        for overrides, sizes in TRAINING.items()
    ]
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in text
