"""Looking at runs, and at what they scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AllowedHosts, AsJson, ConfigFile, Overrides, app, loading, new_display


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run directory, or the URL of its copy (storage.url).")],
    as_json: AsJson = False,
) -> None:
    """How a run stands, live or ended: phase, progress, time left, failures. Reads files only.

    Example: exsearch status runs/demo
    """
    from pipeline.commands.status import in_words
    from pipeline.core.status import status_of

    found = status_of(run)
    typer.echo(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(in_words(found)))


@app.command()
def view(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, one or several.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Write the pages into this folder instead, to open or to host them anywhere."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0: any that is free.")] = 8765,
    allowed_host: AllowedHosts = None,
) -> None:
    """Look at runs in a browser: scores by iteration, questions, every trajectory. Also while they go on. Only reads.

    Example: exsearch view runs/demo
    """
    with loading() as display:
        from pipeline.commands.view import export_view
        from pipeline.commands.view import view as serve_view

    if out is not None:
        export_view(runs, out, display)
    else:
        serve_view(runs, host, port, allowed_host or [], display)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, one or several.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the figures.")] = Path("figures"),
    form: Annotated[str, typer.Option("--format", help="svg, pdf or png.")] = "svg",
    metric: Annotated[str, typer.Option("--metric", help="em, f1 or accuracy.")] = "em",
) -> None:
    """The figures of a paper: dev and test scores, means over seeds, by hops, searches, the E-step, time.

    Only reads. Several runs are drawn into the same figures.

    Example: exsearch plot runs/demo runs/demo-uniform --format pdf
    """
    with loading() as display:
        from pipeline.commands.plot import plot as write_plots

    write_plots(runs, out, form, metric, display)


@app.command()
def evaluate(
    config: ConfigFile = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Take model, index and configuration of this run.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model directory (default: the run's best).")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, dev or test.")] = "dev",
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="Short for evaluation.protocol=NAME: hotpotqa, musique, ..."),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", help="Score this file, in the protocol's format, and no model."),
    ] = None,
    gold: Annotated[
        list[Path] | None, typer.Option("--gold", help="Questions that --predictions answers; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write scores (.json), trajectories and predictions.")
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Score a model on a split: EM, F1, accuracy, retrieval recall, per hop and type; one row per question file.

    Example: exsearch evaluate --run runs/demo --split test

    Example, of the predictions of any program: exsearch evaluate --protocol hotpotqa --predictions FILE --gold FILE
    """
    keys = [*(overrides or []), *([] if protocol is None else [f"evaluation.protocol={protocol}"])]
    if predictions is not None or gold:
        from pipeline.commands.predictions import evaluate_predictions

        display = new_display()
        scores = evaluate_predictions(
            predictions, gold or [], keys, of_a_model=(config, run, model), out=out, display=display
        )
    else:
        with loading() as display:
            from pipeline.commands.evaluate import evaluate_model

        scores = evaluate_model(config, keys, run=run, model=model, split=split, out=out, display=display)
    if as_json:
        typer.echo(json.dumps(scores, ensure_ascii=False))
    else:
        display.scores(scores)


@app.command()
def compare(
    run_a: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="Run directory, or the .parquet of evaluate --out.")
    ],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The same; differences are B - A.")],
    split: Annotated[str, typer.Option("--split", help="test or dev.")] = "test",
    model_a: Annotated[
        str,
        typer.Option(
            "--model-a", help="Which model of A: a test (base, cold_start, ...), an iteration of dev."
        ),
    ] = "best",
    model_b: Annotated[str, typer.Option("--model-b", help="Which model of B.")] = "best",
    changed: Annotated[
        int, typer.Option("--changed", min=0, help="Show so many questions that changed.")
    ] = 10,
    samples: Annotated[
        int, typer.Option("--bootstrap-samples", min=0, help="Resamples for F1 and recall; 0: no intervals.")
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the resamples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Do two models differ? Paired tests on the questions that both have answered, by hops and type; what changed.

    Example: exsearch compare runs/uniform runs/likelihood

    Example, of one run by itself: exsearch compare runs/real runs/real --model-a cold_start
    """
    from rich.console import Console

    from pipeline.commands.compare import compare_runs, print_comparison

    found = compare_runs(run_a, run_b, split, (model_a, model_b), samples, seed)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_comparison(found, Console(), changed)


def _benchmarks(incomplete: str) -> list[str]:
    """Those that are shipped, for a shell to complete."""
    from pipeline.core.shipped import shipped_names

    return [name for name in shipped_names("benchmarks") if name.startswith(incomplete)]


@app.command()
def benchmark(
    which: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="A shipped one (configs/benchmarks), or a file.",
            autocompletion=_benchmarks,
        ),
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override single keys of the file.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of rankings and report (default: runs/benchmarks/NAME)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Retrieval tasks with and without instructions: encoders, BM25, hybrids and re-rankers in one table.

    What was ranked is kept; the same command goes on.

    Example: exsearch benchmark constraints --out runs/constraints
    """
    from rich.console import Console

    with loading() as display:
        from pipeline.commands.benchmark import benchmark as run
        from pipeline.commands.benchmark import print_benchmark

    report = run(which, settings or [], out, display)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        print_benchmark(report, Console())


@app.command()
def weights(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WEIGHTS]...",
            help="Methods, or keys of the section weighting: posterior,floor=0.1 (default: all).",
        ),
    ] = None,
    iteration: Annotated[
        int | None, typer.Option("--iteration", min=1, help="Of this E-step (default: the last one).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The trajectories of an E-step under other weights: what each method would have made of the same samples.

    Weights are those of whole trajectories; what single turns weigh (weighting.credit: turn) is not shown.

    Example: exsearch weights runs/real likelihood posterior posterior,temperature=2
    """
    from rich.console import Console

    from pipeline.commands.weights import other_weights, print_weights

    found = other_weights(run, iteration, methods or [], by_question=as_json)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_weights(found, Console())
