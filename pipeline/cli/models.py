"""What a trained model is for: asked, served, copied out of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AllowedHosts, AsJson, ConfigFile, Overrides, app, loading

Index = Annotated[
    Path | None,
    typer.Option(
        "--index", help="Index directory (default: the configuration's retriever, or the run's own)."
    ),
]
Url = Annotated[
    str | None, typer.Option("--url", help="Retrieval server instead, short for retriever.url=URL.")
]


def retriever_keys(url: str | None) -> list[str]:
    return [] if url is None else [f"retriever.url={url}"]


@app.command()
def ask(
    question: Annotated[
        str | None, typer.Argument(help="What you want to know (default: each line of standard input).")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model directory, or a name of the hub.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Run directory instead: the model of its best iteration.")
    ] = None,
    index: Index = None,
    url: Url = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", help='File of questions instead, {"id", "question"} a line.'),
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Ask questions; of one at a time, watch the agent think, search and record.

    The engine is started once, however many there are.

    Example: exsearch ask --run runs/demo "Who founded the maker of the Silver Harp?"

    Example: exsearch ask --model MODEL --index INDEX --questions questions.jsonl --json > answers.jsonl

    Example, of a question in each line: exsearch ask --model models/searcher --index runs/demo/index < lines.txt
    """
    with loading() as display:
        from pipeline.commands.answerer import best_model, settings_line, settings_of
        from pipeline.commands.ask import ask as run_ask
        from pipeline.core.config.loading import is_override
        from pipeline.methods import load

    # The question may stand before or behind the keys.
    words = [word for word in (question, *(overrides or [])) if word is not None]
    texts = [word for word in words if not is_override(word)]
    if questions is None and len(texts) == 1:
        (question,) = texts
        overrides = [word for word in words if word != question]
    else:
        question, overrides = None, words
    own = settings_of(model, run)
    loaded = load(config or own, [*overrides, *retriever_keys(url)])
    if model is None:
        assert run is not None  # else its settings would have been missed
        model = best_model(run, loaded)
    display.line(settings_line(model, config or own))
    run_ask(question, questions, model, index, loaded, display, typer.echo, run=run, json_lines=as_json)


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
    index: Index = None,
    url: Url = None,
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
    allowed_host: AllowedHosts = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Pages of this origin, as https://chat.example.org, may ask from a browser (CORS); may be repeated.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="What the model is called in requests.")] = "exsearch",
    lenient: Annotated[
        bool,
        typer.Option(
            "--lenient",
            help="Pass over system messages, an assistant's greeting and parameters that cannot be heeded (max_tokens, "
            "stop, tools, ...) instead of refusing them; replies name them.",
        ),
    ] = False,
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
    with loading() as display:
        from pipeline.commands.answerer import settings_line, settings_of
        from pipeline.commands.serve import serve as run_serve
        from pipeline.methods import load
        from pipeline.serve.settings import ServeSettings, read_token

    settings = ServeSettings(
        host=host,
        port=port,
        token=None if token_file is None else read_token(token_file),
        allowed_hosts=tuple(allowed_host or ()),
        allow_origins=tuple(allow_origin or ()),
        name=name,
        lenient=lenient,
        max_conversations=max_conversations,
        max_waiting=max_waiting,
        deadline_s=deadline,
        grace_s=grace,
        follow_s=follow_every,
    )
    own = settings_of(model, follow, "--follow")
    loaded = load(config or own, [*(overrides or []), *retriever_keys(url)])
    display.line(settings_line(model or str(follow), config or own))
    run_serve(model, follow, index, loaded, settings, as_tools=mcp, display=display)


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
    with loading() as display:
        from pipeline.commands.export import export_model

    export_model(run, out, iteration, policy, push, public, display)
