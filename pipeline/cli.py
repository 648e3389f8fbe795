"""The command line: parse, call, print. No logic.

    exsearch --help
    python -m pipeline.cli --help       (what `ray job submit` runs)

Exit codes: 0 done, 2 the user can mend it (one clear message), 130 or 143 interrupted (Ctrl-C, SIGTERM), 1 anything
else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.core.errors import RunError, UserError
from pipeline.core.plan.machine import GPU_MEMORY_GIB
from retriever_service.cli import app as index_app
from retriever_service.console import (
    Commands,
    CorpusSources,
    EncoderDtype,
    EncoderName,
    MaxTokens,
    Out,
    PassagePrefix,
    QueryPrefix,
    VectorsDtype,
    encoder_spec,
)
from retriever_service.errors import RetrieverError
from retriever_service.imports import quick_imports

if TYPE_CHECKING:
    from pipeline.core.display import Display


class _Commands(Commands):
    mendable = (UserError, RetrieverError)
    failures = (RunError,)
    resumable = ("demo", "train", "experiment", "fetch")


app = typer.Typer(
    cls=_Commands,
    help="Train a language model to search, from question-answer pairs alone, by generalised EM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(index_app, name="index")
data_app = typer.Typer(
    cls=_Commands, help="Look at questions and corpora before they are trained on.", no_args_is_help=True
)
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"exsearch {version('exsearch')}")
        raise typer.Exit


@app.callback()
def of_the_program(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


ConfigFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--config", "-c", help="YAML file; see configs/ and docs/. Several: later ones win, key by key."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override single keys.")
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run directory. Resumes what it holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for programs.")]


def _display() -> Display:
    from pipeline.core.display import Display

    return Display()


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
    with quick_imports(without=()):
        from pipeline import methods

    display = _display()
    path = run or Path("runs") / ("-".join(file.stem for file in config) if config else "default")
    settings = [*(overrides or []), *(["tracking.profile=true"] if profile else [])]
    display.outcome(methods.train(methods.load(config, settings), path, display))
    display.line(f"report: {path / 'report.json'}")


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
    """The whole EM loop on a generated encyclopedia: a tiny model teaches itself to search."""
    with quick_imports(without=()):
        from pipeline.commands.demo import run_demo

    display = _display()
    run_demo(run, overrides or [], display)


@app.command()
def experiment(
    which: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A shipped one (configs/experiments), or a file.")
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

    Finished runs are kept; the same command goes on. Example: exsearch experiment weightings --dry-run
    """
    with quick_imports(without=()):
        from pipeline.commands.experiment import run_experiment

    run_experiment(
        which,
        overrides or [],
        out=out,
        results=results,
        seeds=seed or (),
        dry_run=dry_run,
        table=table,
        display=_display(),
    )


@app.command()
def world(
    out: Annotated[Path, typer.Option("--out", help="Directory to write; new, empty, or this very world.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed is another world.")] = 0,
    size: Annotated[
        str, typer.Option("--size", help="small, medium or large: 2e3, 1e5 or 2e6 passages.")
    ] = "small",
) -> None:
    """Generate an encyclopedia with multi-hop questions."""
    from pipeline.commands.demo import make_world

    summary = make_world(out, seed, size, _display())
    typer.echo(json.dumps(summary))


@app.command("cold-start")
def cold_start(
    out: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Synthesise cold-start trajectories from gold supervision, for `cold_start.trajectories`."""
    from pipeline.commands.cold_start import write_cold_start
    from pipeline.methods import load

    typer.echo(json.dumps(write_cold_start(load(config, overrides or []), out, _display())))


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

    Or the predictions of any program: exsearch evaluate --protocol hotpotqa --predictions FILE --gold FILE
    """
    display = _display()
    keys = [*(overrides or []), *([] if protocol is None else [f"evaluation.protocol={protocol}"])]
    if predictions is not None or gold:
        from pipeline.commands.predictions import evaluate_predictions

        scores = evaluate_predictions(
            predictions, gold or [], keys, of_a_model=(config, run, model), out=out, display=display
        )
    else:
        with quick_imports(without=()):
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

    One run by itself: exsearch compare runs/real runs/real --model-a cold_start
    """
    from rich.console import Console

    from pipeline.commands.compare import compare_runs, print_comparison

    found = compare_runs(run_a, run_b, split, (model_a, model_b), samples, seed)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        print_comparison(found, Console(), changed)


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


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run directory, or the URL of its copy (storage.url).")],
    as_json: AsJson = False,
) -> None:
    """How a run stands, live or ended: phase, progress, time left, failures. Reads files only."""
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
) -> None:
    """Look at runs in a browser: scores by iteration, questions, every trajectory. Also while they go on. Only reads.

    Example: exsearch view runs/demo
    """
    with quick_imports():
        from pipeline.commands.view import export_view
        from pipeline.commands.view import view as serve_view

    if out is not None:
        export_view(runs, out, _display())
    else:
        serve_view(runs, host, port, _display())


@app.command()
def ask(
    model: Annotated[str, typer.Option("--model", help="Model directory.")],
    question: Annotated[
        str | None, typer.Argument(help="What you want to know (default: each line of standard input).")
    ] = None,
    index: Annotated[
        Path | None, typer.Option("--index", help="Index directory (default: the configuration's retriever).")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help='File of questions instead, {"id", "question"} a line.'),
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Ask questions; of one at a time, watch the agent think, search and record.

    The engine is started once, however many there are. Example: exsearch ask --model MODEL --index INDEX < lines.txt
    """
    with quick_imports(without=()):
        from pipeline.commands.ask import ask as run_ask
        from pipeline.commands.ask import settings_of
    from pipeline.core.config.loading import is_override
    from pipeline.methods import load

    overrides = overrides or []
    if question is not None and (questions is not None or is_override(question)):
        # What stands first where no question does.
        overrides = [question, *overrides]
        question = None
    loaded = load(config or settings_of(model), overrides)
    run_ask(question, questions, model, index, loaded, _display(), typer.echo, json_lines=as_json)


@app.command()
def serve(
    model: Annotated[str | None, typer.Option("--model", help="Model directory.")] = None,
    follow: Annotated[
        Path | None,
        typer.Option(
            "--follow",
            help="Run directory instead: its newest model, and each newer one as soon as it is there.",
        ),
    ] = None,
    index: Annotated[
        Path | None, typer.Option("--index", help="Index directory (default: the configuration's retriever).")
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Retrieval server instead, short for retriever.url=URL.")
    ] = None,
    mcp: Annotated[
        bool,
        typer.Option(
            "--mcp", help="On standard input and output, as tools for one client, and not over HTTP."
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8080,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token that clients must send (default: none).")
    ] = None,
    name: Annotated[str, typer.Option(help="What the model is called in requests.")] = "exsearch",
    max_conversations: Annotated[
        int | None, typer.Option(help="Answers made at once (default: as many as the KV cache holds).")
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Answers that may wait; beyond it: 429.")] = 256,
    deadline: Annotated[float, typer.Option(help="Seconds after which an answer is given up: 504.")] = 120.0,
    grace: Annotated[float, typer.Option(help="Seconds for answers in flight after SIGTERM.")] = 30.0,
    follow_every: Annotated[
        float, typer.Option(help="Seconds between looks for a newer model; SIGHUP has it look at once.")
    ] = 10.0,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Serve a trained agent: OpenAI's chat completions and responses, a page for people, tools for agents (MCP).

    Example: exsearch serve --model MODEL --index INDEX --port 8080

    Example: exsearch serve --follow runs/mine --token-file token.txt

    Example: exsearch serve --mcp --model MODEL --url http://127.0.0.1:8000
    """
    with quick_imports(without=()):
        from pipeline.commands.serve import config_of
        from pipeline.commands.serve import serve as run_serve
    from pipeline.methods import load
    from pipeline.serve.settings import ServeSettings, read_token

    settings = ServeSettings(
        host=host,
        port=port,
        token=None if token_file is None else read_token(token_file),
        name=name,
        max_conversations=max_conversations,
        max_waiting=max_waiting,
        deadline_s=deadline,
        grace_s=grace,
        follow_s=follow_every,
    )
    keys = [*(overrides or []), *([] if url is None else [f"retriever.url={url}"])]
    loaded = load(config or config_of(model, follow), keys)
    run_serve(model, follow, index, loaded, settings, as_tools=mcp, display=_display())


@data_app.command("check")
def check_data(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Leaks, doubles and evidence coverage: is trained on what is asked later, does the corpus hold the answers?

    Example: exsearch data check data.train=train.jsonl data.dev=dev.jsonl data.corpus=corpus.jsonl
    """
    from rich.console import Console

    from pipeline.commands import data
    from pipeline.methods import load

    found = data.check_data(load(config, overrides or []), _display())
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        data.print_check(found, Console())


@data_app.command("fetch")
def fetch_data(
    name: Annotated[
        str,
        typer.Argument(help="hotpotqa, 2wikimultihopqa, musique, nq, triviaqa, popqa or bamboogle."),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write: new, empty, or begun by this command.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="Folder with a copy, or hf:NAME[:CONFIG] (default: its place on the hub)."
        ),
    ] = None,
) -> None:
    """A data set in our files, with its passages where it brings some. Killed or interrupted, the same command goes on.

    A copy may be the authors' own files, the hub's Parquet files, a saved data set, or FlashRAG's layout.
    """
    from pipeline.commands.data import fetch

    typer.echo(json.dumps(fetch(name, out, source, _display()), ensure_ascii=False))


@index_app.command("encode-with-ray")
def encode_with_ray(
    corpus: CorpusSources,
    out: Out,
    encoder: EncoderName = "minilm",
    query_prefix: QueryPrefix = None,
    passage_prefix: PassagePrefix = None,
    max_tokens: MaxTokens = None,
    encoder_dtype: EncoderDtype = None,
    dtype: VectorsDtype = "float32",
    actors: Annotated[
        int | None,
        typer.Option(help="Encoders (default: one per GPU of the cluster, without GPUs per core)."),
    ] = None,
) -> None:
    """As `encode`, on the devices of a Ray cluster; the directory must be on a path that all its nodes see.

    Killed or interrupted, the same command goes on. RAY_ADDRESS names the cluster.
    """
    from pipeline.commands.encode import encode_on_cluster

    display = _display()
    spec = encoder_spec(encoder, query_prefix, passage_prefix, max_tokens, encoder_dtype)
    store = encode_on_cluster(corpus, out, spec, display, num_actors=actors, store_dtype=dtype)
    display.line(f"{out}: {store.manifest.count:,} passages, {store.manifest.dimension} dimensions, {dtype}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write: new or empty.")],
    iteration: Annotated[
        str, typer.Option("--iteration", help="Number, or best: the one that dev questions chose.")
    ] = "best",
    policy: Annotated[
        str | None, typer.Option("--policy", help="Which one, where the run trains several.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="NAMESPACE/NAME", help="Also put it on the Hugging Face hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a new repository is for everybody.")
    ] = False,
) -> None:
    """Copy a trained model out of its run: weights, tokenizer, agent settings and a model card.

    Example: exsearch export runs/demo --out models/searcher && exsearch ask --model models/searcher --index INDEX
    """
    with quick_imports(without=()):
        from pipeline.commands.export import export_model

    export_model(run, out, iteration, policy, push, public, _display())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What is installed here, what the machine has, and what of it will not do (then the exit code is 1)."""
    with quick_imports(without=()):
        from pipeline.commands.doctor import doctor as look
        from pipeline.commands.doctor import in_words

    found = look()
    for line in [json.dumps(found, ensure_ascii=False)] if as_json else in_words(found):
        typer.echo(line)
    if found["problems"]:
        raise typer.Exit(1)


@app.command("config")
def show_config(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved configuration."""
    import yaml

    from pipeline.methods import load

    tree: dict[str, Any] = load(config, overrides or []).model_dump(mode="json")
    typer.echo(json.dumps(tree) if as_json else yaml.safe_dump(tree, sort_keys=False), nl=as_json)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
