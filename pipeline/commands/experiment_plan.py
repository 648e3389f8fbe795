"""What an experiment would do, before it does anything: runs, and about how long they take."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.commands.plan import make_plan
from pipeline.core.config import Config
from pipeline.core.data.world.spec import Size, WorldSpec
from pipeline.core.data.world.writer import write_world
from pipeline.core.experiments.numbers import RunNumbers, settings_of
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.experiments.spec import Experiment
from pipeline.core.plan.assumptions import Assumptions
from pipeline.core.plan.observed import QUESTIONS_OF
from pipeline.core.plan.run_plan import RunPlan
from pipeline.core.plan.shape import UnknownShape
from pipeline.core.status import seconds_of


def print_plan(experiment: Experiment, runs: Sequence[PlannedRun], kept: Mapping[str, RunNumbers]) -> None:
    """A line per arm on standard output.

    Args:
        kept: numbers of runs, also of other experiments, by their settings.

    Raises:
        UserError: a run does not fit this machine.
    """
    title = f"{experiment.name}: {len(runs)} runs"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("arm", overflow="fold")
    for column in ("runs", "kept", "finished", "elsewhere", "begun", "time of one", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    took = {settings: numbers.points[-1].seconds for settings, numbers in kept.items() if numbers.points}
    took |= {settings_of(run): _seconds(run) for run in runs if run.is_finished()}
    left, unknown = 0.0, 0
    of_arms = {arm.name: [run for run in runs if run.arm is arm] for arm in experiment.with_runs}
    with tempfile.TemporaryDirectory() as scratch:
        times = {
            name: _seconds_of_one(own, took, experiment.spec.world, Path(scratch) / "world")
            for name, own in of_arms.items()
        }
    for name, own in of_arms.items():
        open_ = [run for run in own if settings_of(run) not in kept]
        finished = sum(run.is_finished() for run in open_)
        begun = sum(run.is_begun() for run in open_) - finished
        elsewhere = sum(run.same_elsewhere() is not None for run in open_)
        to_do = len(open_) - finished - elsewhere
        one, how = times[name]
        if one is None:
            unknown += to_do
        left += to_do * (one or 0.0)
        counts = (len(own), len(own) - len(open_), finished, elsewhere, begun)
        table.add_row(
            escape(name),
            *map(str, counts),
            f"{_time(one)} {how}".strip(),
            _time(None if one is None else to_do * one),
        )
    console = Console()
    console.print(table)
    rest = f", and {unknown} runs of which no time is known" if unknown else ""
    console.print(f"about {_time(left)} left{rest}; without starts", highlight=False)
    for arm in experiment.arms:
        if not arm.has_runs:
            console.print(
                f"{arm.name}: the test {arm.test} of the runs of {arm.of}", markup=False, highlight=False
            )


def _seconds_of_one(
    runs: Sequence[PlannedRun], took: Mapping[str, float], world: Size | None, stand_in: Path
) -> tuple[float | None, str]:
    """Of one of the runs of an arm, and where that is from: as long as those took that are known, by their settings;
    else as others took, else as `exsearch plan` says."""
    if own := [took[settings] for run in runs if (settings := settings_of(run)) in took]:
        return statistics.mean(own), "measured"
    if took:
        return statistics.mean(took.values()), "as others"
    try:
        plan = _plan(runs[0].config, world, stand_in)
    except UnknownShape:
        return None, ""
    plan.check()
    return (plan.seconds(), "planned") if plan.phases else (None, "")


def _seconds(run: PlannedRun) -> float:
    """Of all steps of a finished run."""
    of_iterations = (
        step for t in range(run.config.of_recipe.iterations + 1) for step in run.files.steps(t).values()
    )
    return seconds_of([*of_iterations, *run.files.test_results().values()])


def _plan(config: Config, world: Size | None, stand_in: Path) -> RunPlan:
    """A generated world need not be there yet: how many questions it will have is known, and those of a small one are
    of the same kind."""
    if world is None or Path(config.data.root, config.data.train[0]).exists():
        return make_plan(config, None, Assumptions())
    if not stand_in.exists():
        write_world(stand_in, seed=0, size="small")
    spec = WorldSpec.of_size(0, world)
    limits = {split: getattr(config.data, f"{split}_limit") for split in QUESTIONS_OF}
    numbers = {split: spec.num_questions(split) for split in QUESTIONS_OF}
    counted = {
        key: min(numbers[split], limits[split] or numbers[split]) for split, key in QUESTIONS_OF.items()
    }
    data = config.data.model_copy(update={"root": str(stand_in)})
    return make_plan(config.model_copy(update={"data": data}), None, Assumptions.model_validate(counted))


def _time(seconds: float | None) -> str:
    return "not known" if seconds is None else str(timedelta(seconds=round(seconds)))
