"""How long training stands still for a checkpoint: written in the background, against written while training waits."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.learner import make_examples, make_learner, save_model
from bench.measure import Ratio, in_turn
from pipeline.core.losses.likelihood import WeightedNll

HIDDEN, LAYERS = 512, 6
"""19 million parameters: 0.2 GB of weights and moments."""


def run() -> list[Ratio]:
    """One rank, float32. The rates are those of the checkpoint's bytes to the time that training stands still."""
    with tempfile.TemporaryDirectory() as scratch:
        model, checkpoints = Path(scratch) / "model", Path(scratch) / "learner"
        save_model(model, HIDDEN, LAYERS)
        learner = make_learner(model)
        learner.train(make_examples()[:2], WeightedNll(), phase_seed=0)  # fills the moments
        learner.save(checkpoints)
        megabytes = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file()) / 1e6

        def rate(stop: Callable[[], None]) -> float:
            learner.finish_checkpoint()
            start = time.perf_counter()
            stop()
            return megabytes / (time.perf_counter() - start)

        ours, limit = in_turn(
            lambda: rate(lambda: learner.checkpoint(checkpoints)),
            lambda: rate(lambda: learner.save(checkpoints)),
        )
        learner.shutdown()
    return [Ratio("checkpoint, 1 rank", "training waits for the disk", "MB", ours, limit, goal=3.0)]
