"""Experiments: the runs of all arms and seeds one after the other, then tables and plots of what is finished."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from actors.planning import check_memory
from pipeline import methods
from pipeline.commands.demo import make_world, world_settings
from pipeline.commands.experiment_plan import print_plan
from pipeline.commands.experiment_run import run_in_process
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import RunError, UserError
from pipeline.core.experiments.numbers import kept_numbers, settings_of
from pipeline.core.experiments.page import check_page, write_page
from pipeline.core.experiments.planned import PlannedRun, plan_runs
from pipeline.core.experiments.results import Results, read_results
from pipeline.core.experiments.spec import Experiment, read_experiment, world_folder
from pipeline.core.experiments.tables import make_table
from pipeline.core.figures import require_matplotlib
from pipeline.core.packages import has_gpu_packages
from pipeline.core.plan.machine import this_machine
from pipeline.core.preflight import check_models
from pipeline.core.retrieval import prepare_index
from pipeline.core.shipped import CONFIGS, find_shipped

WORLD_SEED = 0


def run_experiment(
    which: str,
    overrides: Sequence[str],
    *,
    out: Path | None,
    results: Path | None,
    seeds: Sequence[int],
    dry_run: bool,
    table: bool,
    display: Display,
) -> None:
    """Make what is missing of an experiment, and write its results.

    Args:
        which: name of a shipped experiment, or file.
        overrides: `key=value` for all runs.
        out: folder of experiments, which share worlds, indexes and runs; None: runs/experiments.
        results: folder of `results.md` and `figures/`; None: that of the experiment in `out`. Runs whose numbers are
            kept there are not made again.
        seeds: make the runs of these alone; empty: of all. The results are of all that is finished.
        dry_run: only show what would be done.
        table: only write the results of what is finished.

    Raises:
        UserError: bad input, before any run starts.
        RunError: runs failed. The others went on, and are in the results.
    """
    experiment = read_experiment(find_shipped("experiments", which))
    home = (out or Path("runs") / "experiments").absolute() / experiment.name
    folder = results or home
    runs = _planned(experiment, home, overrides)
    if others := [seed for seed in seeds if seed not in experiment.spec.seeds]:
        raise UserError(
            f"{experiment.file} has no seed {others[0]}; its seeds are {list(experiment.spec.seeds)}"
        )
    wanted = [run for run in runs if not seeds or run.seed in seeds]
    kept = kept_numbers(folder)
    if dry_run:
        print_plan(experiment, wanted, kept)
        return
    if experiment.spec.plots:
        require_matplotlib(f"have `plots: []` in {experiment.file}")
    check_page(folder, experiment.name)
    where = ["--out", str(out)] if out is not None else []
    command = shlex.join(["exsearch", "experiment", which, *overrides, *where])

    def write() -> tuple[Results, list[Path]]:
        found = read_results(experiment, runs, kept)
        return found, write_page(found, folder, command) if found.arms else []

    failed = [] if table else _make(experiment, home, wanted, kept.keys(), write, display)
    found, written = write()
    if written:
        if "test" in experiment.spec.tables:
            display.line(make_table("test", found))
        display.line("written: " + ", ".join(map(str, written)))
    elif table:
        raise UserError(
            f"no run of {experiment.name} is finished in {home}; leave out --table, or name the folder of the "
            "experiments with --out"
        )
    if failed:
        raise RunError("\n".join([f"{len(failed)} of {len(wanted)} runs failed:", *failed]))


def _planned(experiment: Experiment, home: Path, overrides: Sequence[str]) -> list[PlannedRun]:
    defaults: dict[str, object] = {}
    if experiment.spec.world is not None:
        (machine,) = this_machine()
        devices = (has_gpu_packages() and machine.gpus) or machine.cpus
        defaults = world_settings(home.parent / world_folder(experiment.spec.world), devices)
    return plan_runs(
        experiment,
        home,
        configs=CONFIGS,
        load=methods.load,
        defaults=defaults,
        overrides=overrides,
    )


def _make(
    experiment: Experiment,
    home: Path,
    runs: Sequence[PlannedRun],
    kept: Collection[str],
    write: Callable[[], object],
    display: Display,
) -> list[str]:
    """What is neither finished nor kept, one run after the other; gives a line for each that failed.

    Args:
        write: the results so far, after each run: whoever stops a long experiment, or loses the machine, has them.
    """
    without_numbers = [run for run in runs if settings_of(run) not in kept]
    for run in without_numbers:
        if (other := run.link()) is not None:
            display.line(f"{run.title}: is the run {os.path.relpath(other)}")
    to_do = [run for run in without_numbers if not run.is_finished()]
    if there := len(runs) - len(without_numbers):
        display.line(f"{there} of {len(runs)} runs have their numbers in the results already")
    for run in {run.arm.name: run for run in to_do}.values():
        policies = methods.policies(run.config)
        check_models({spec.model.path for spec in policies})
        check_memory(run.config, policies)
    if to_do and (size := experiment.spec.world) is not None:
        make_world(home.parent / world_folder(size), WORLD_SEED, size, display)
    # Each distinct data once; the seed is that of the sample of questions.
    for run in {(run.config.data.model_dump_json(), run.seed): run for run in to_do}.values():
        required = ("train", "dev", "test") if run.config.of_recipe.iterations else ("test",)
        load_splits(run.config.data, run.config.seed, required=required)
    for run in {run.index: run for run in to_do if run.index is not None}.values():
        _build_index(run, display)
    failed = []
    title = f"experiment {experiment.name}"
    with display.progress(title, len(runs), "runs", done=len(runs) - len(to_do)) as advance:
        for run in to_do:
            run.path.parent.mkdir(parents=True, exist_ok=True)
            with display.changing(run.title) as tell:
                reason = run_in_process(run, tell)
            if reason is not None:
                failed.append(f"  {run.title}: {reason}")
                display.error(f"{run.title} failed: {reason}")
            else:
                write()
            advance(1)
    return failed


def _build_index(run: PlannedRun, display: Display) -> None:
    """The index that several runs share, unless it is there."""
    assert run.index is not None
    run.index.parent.mkdir(parents=True, exist_ok=True)
    own = run.config.retriever.model_copy(update={"index": None})
    prepare_index(own, run.config.data, run.index, display)
