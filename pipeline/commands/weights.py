"""The trajectories of one E-step under other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from pipeline.core.config import Config, WeightingConfig
from pipeline.core.config.loading import load_config
from pipeline.core.config.method import Weighting
from pipeline.core.errors import UserError
from pipeline.core.rewards import is_own
from pipeline.core.reweighing import as_json, figures_of, is_from_the_model, read_stored, reweigh
from pipeline.core.run import Json, RunFiles, finite
from pipeline.core.scoring.answers import METRICS
from pipeline.core.tables import narrow_table, number
from pipeline.methods import load


def other_weights(path: Path, t: int | None, methods: Sequence[str], *, by_question: bool) -> Json:
    """What other weights would have made of the samples that a run has.

    Args:
        t: iteration; None: the last one that was sampled.
        methods: each a method, or keys of the section `weighting` divided by commas: "posterior,floor=0.1". none: the
            run's own and every method.
        by_question: give every weight, and what it is made of, as well.

    Returns:
        `{"run", "iteration", "weightings": {name: figures}}`; `by_question`: `questions` too (`reweighing.as_json`).

    Raises:
        UserError: no run, no such E-step, or no such weights.
    """
    run = RunFiles(path)
    run.check_is_run()
    config = load(path / "config.yaml")
    sampled = sorted(int(at.parent.name) for at in run.path.glob("iterations/*/sample.json"))
    if t is None and not sampled:
        raise UserError(f"{path} has no finished E-step yet")
    stored = read_stored(run, t if t is not None else sampled[-1])
    chosen = {"the run's own": config.weighting} if not methods else {}
    chosen |= {text: _weighting(text, config) for text in methods or get_args(Weighting)}
    is_model = is_from_the_model(config)
    found: Json = {
        "run": str(path),
        "iteration": t if t is not None else sampled[-1],
        "weightings": {
            name: figures_of(stored, weighting, from_the_model=is_model) for name, weighting in chosen.items()
        },
    }
    if by_question:
        weights = {
            name: [reweigh(one, weighting, from_the_model=is_model) for one in stored]
            for name, weighting in chosen.items()
        }
        found["questions"] = as_json(stored, weights)
    return dict(finite(found))


def _weighting(text: str, config: Config) -> WeightingConfig:
    """A method; the correction of the proposal is the run's own unless it is given."""
    given = [part if "=" in part else f"method={part}" for part in text.split(",")]
    own = config.weighting
    defaults = [f"weighting.{key}={getattr(own, key)}" for key in ("correct_proposal", "max_ratio")]
    found = load_config(None, [*defaults, *(f"weighting.{key}" for key in given)]).weighting
    if is_own(found.reward) and found.reward != own.reward:
        raise UserError(
            f"{text}: no rewards of a run's trajectories are known but {', '.join(METRICS)} and its own, {own.reward}"
        )
    return found


def print_weights(found: Mapping[str, Any], console: Console) -> None:
    """A row per weighting."""
    title = f"{found['run']}, iteration {found['iteration']}: the same trajectories under other weights"
    table = narrow_table(title, "weights", ("ESS", "ESS of all", "of", "on right %", "mean w"))
    for name, row in found["weightings"].items():
        table.add_row(
            name,
            number(row["effective_sample_size"], 2),
            number(row["global_effective_sample_size"], 0),
            str(row["weighted_trajectories"]),
            number(row["right_share"]),
            number(row["mean_weight"], 3),
        )
    console.print(table)
    console.print(
        "ESS: effective sample size, mean over questions, and of all weighted trajectories together;\n"
        "on right: share of all weight on trajectories whose own answer is right",
        highlight=False,
        soft_wrap=True,
    )
