"""Making things: runs, experiments, worlds, cold starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, ConfigFile, Overrides, RunOption, app, loading
from pipeline.core.plan.machine import GPU_MEMORY_GIB


@app.command()
def train(
    config: ConfigFile = None,
    run: RunOption = None,
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also write a timeline of one iteration (tracking.profile).")
    ] = False,
) -> None:
    """Train by EM, or by the recipe of the configuration; the same command goes on with an interrupted run.

    Example: exsearch train --config configs/real-cpu.yaml --run runs/real data.root=DIR em.iterations=2
    """
    with loading() as display:
        from pipeline import methods
        from pipeline.commands.next_steps import next_steps

    path = run or Path("runs") / ("-".join(file.stem for file in config) if config else "default")
    settings = [*(overrides or []), *(["tracking.profile=true"] if profile else [])]
    display.outcome(methods.train(methods.load(config, settings), path, display))
    display.line(f"report: {path / 'report.json'}")
    display.line(next_steps(path, "a question"))


@app.command()
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Plan for machines with so many GPUs each (default: this machine)."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="So many of them.")] = 1,
    gpu_memory_gib: Annotated[
        float, typer.Option(min=0.1, help="Memory of each GPU; by default that of an 80 GB card.")
    ] = GPU_MEMORY_GIB,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of each machine (default: not looked at).")
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Another assumption of the estimate.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a run will need: placement, memory by part, disk, tokens, time. Starts nothing; refuses what cannot fit.

    Example: exsearch plan --config configs/qwen2.5-7b-8gpu.yaml --gpus 8
    """
    with loading():
        from rich.console import Console

        from pipeline.commands.plan import make_plan, print_plan
        from pipeline.core.plan.assumptions import read_assumptions
        from pipeline.core.plan.machine import gpu_nodes
        from pipeline.methods import load

    machines = None if gpus is None else gpu_nodes(nodes, gpus, gpu_memory_gib, memory_gib)
    made = make_plan(load(config, overrides or []), machines, read_assumptions(assume or []))
    if as_json:
        typer.echo(json.dumps(made.as_json(), ensure_ascii=False))
    else:
        print_plan(made, Console())
    made.check()


@app.command()
def demo(
    run: Annotated[Path, typer.Option("--run", help="Run directory. Resumes what it holds.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
) -> None:
    """The whole EM loop on a generated encyclopedia: a tiny model teaches itself to search.

    Example: exsearch demo --run runs/demo-uniform weighting=uniform
    """
    with loading() as display:
        from pipeline.commands.demo import run_demo

    run_demo(run, overrides or [], display)


def _experiments(incomplete: str) -> list[str]:
    """Those that are shipped, for a shell to complete."""
    from pipeline.core.shipped import shipped_names

    return [name for name in shipped_names("experiments") if name.startswith(incomplete)]


@app.command()
def experiment(
    which: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="A shipped one (configs/experiments), or a file.",
            autocompletion=_experiments,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the experiments, runs in NAME/ARM (default: runs/experiments)."
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--results", help="Folder of results.md and figures/ (default: NAME in --out)."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="This one of its seeds alone; repeatable.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the runs and about how long they take.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Only write the results of finished runs anew.")
    ] = False,
) -> None:
    """Many runs that differ in named settings, under several seeds; tables with intervals, and plots.

    Finished runs are kept; the same command goes on.

    Example: exsearch experiment weightings --dry-run
    """
    with loading() as display:
        from pipeline.commands.experiment import run_experiment

    run_experiment(
        which,
        overrides or [],
        out=out,
        results=results,
        seeds=seed or (),
        dry_run=dry_run,
        table=table,
        display=display,
    )


@app.command()
def world(
    out: Annotated[Path, typer.Option("--out", help="Directory to write; new, empty, or this very world.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed is another world.")] = 0,
    size: Annotated[
        str, typer.Option("--size", help="small, medium or large: 2e3, 1e5 or 2e6 passages.")
    ] = "small",
) -> None:
    """Generate an encyclopedia with multi-hop questions.

    Example: exsearch world --out runs/world --seed 1
    """
    with loading() as display:
        from pipeline.commands.demo import make_world

    summary = make_world(out, seed, size, display)
    typer.echo(json.dumps(summary))


@app.command("cold-start")
def cold_start(
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Synthesise cold-start trajectories from gold supervision, for `cold_start.trajectories`.

    Example: exsearch cold-start --config configs/demo.yaml --out cold_start.parquet data.root=runs/world
    """
    with loading() as display:
        from pipeline.commands.cold_start import write_cold_start
        from pipeline.methods import load

    typer.echo(json.dumps(write_cold_start(load(config, overrides or []), out, display)))
