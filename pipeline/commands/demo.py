"""The demo: a generated encyclopedia, a tiny model, and the whole EM loop on them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from actors.planning import check_memory
from actors.session import count_devices, ray_session
from pipeline import methods
from pipeline.commands.next_steps import next_steps
from pipeline.core.config import Config
from pipeline.core.config.loading import load_config
from pipeline.core.data.world.writer import write_world
from pipeline.core.display import Display
from pipeline.core.run import Json, check_directory
from pipeline.core.shipped import CONFIGS, TINY_SEARCHER
from pipeline.em import train

MAX_ENGINES_AND_RANKS = 2
"""More do not make so small a run faster."""


def run_demo(run: Path, overrides: Sequence[str], display: Display) -> Json:
    """Make the world beside the run directory, train on it, and show what came of it.

    Raises:
        UserError: bad overrides, or a run directory that holds something else.
    """
    world = run.with_name(f"{run.name}-world")
    config = demo_config(world, overrides)
    check_directory(run, config)
    check_memory(config, methods.policies(config))
    with ray_session(config.cluster, display.line):
        config = demo_config(world, overrides, count_devices())
        make_world(world, seed=config.data.sample_seed(0), size="small", display=display)
        outcome = train(config, run, display)
    display.outcome(outcome)
    question = json.loads((world / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])["question"]
    changed = shlex.quote(f"{run}-posterior")
    display.line(next_steps(run, question, [f"demo --run {changed} weighting=posterior"]))
    display.line(f"The figures are in {run / 'report.json'}; docs/quickstart.md goes on from here.")
    return outcome.report


def demo_config(world: Path, overrides: Sequence[str], devices: int = 1) -> Config:
    """`configs/demo.yaml` on a world, with an engine and a learner rank per device: GPU, or CPU core without GPUs."""
    defaults = [f"{key}={value}" for key, value in world_settings(world, devices).items()]
    return load_config(CONFIGS / "demo.yaml", [*defaults, *overrides])


def world_settings(world: Path, devices: int) -> dict[str, object]:
    """The keys that no file of configs/ for a generated world can say: where it is, and what the machine has."""
    size = min(devices, MAX_ENGINES_AND_RANKS)
    return {
        "data.root": str(world),
        "model.path": str(TINY_SEARCHER),
        "rollout.workers": size,
        "learner.num_ranks": size,
    }


def make_world(out: Path, seed: int, size: str, display: Display) -> Json:
    """Write a generated world, or find that it is there already; returns what it holds.

    Raises:
        UserError: unknown size, or `out` holds something else.
    """
    with display.progress("generating the encyclopedia", None, "records") as advance:
        return asdict(write_world(out, seed=seed, size=size, on_progress=advance.to))  # type: ignore[arg-type]
