"""The applications that commands are added to, and the options that several of them have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import RunError, UserError
from retriever_service.cli import app as index_app
from retriever_service.console import Commands
from retriever_service.errors import RetrieverError
from retriever_service.imports import quick_imports

if TYPE_CHECKING:
    from pipeline.core.display import Display


class _Commands(Commands):
    mendable = (UserError, RetrieverError)
    failures = (RunError,)
    resumable = ("demo", "train", "experiment", "benchmark", "fetch")


app = typer.Typer(
    cls=_Commands,
    help="Train a language model to search, from question-answer pairs alone, by generalised EM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(index_app, name="index")
data_app = typer.Typer(
    cls=_Commands, help="Look at questions and corpora before they are trained on.", no_args_is_help=True
)
app.add_typer(data_app, name="data")

ConfigFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--config", "-c", help="YAML file; see configs/ and docs/. Several: later ones win, key by key."
    ),
]


def _keys(incomplete: str) -> list[str]:
    """Of the configuration with their defaults, for a shell to complete: what it puts there is whole."""
    from pipeline.core.config import Config
    from pipeline.core.run import flatten

    defaults = flatten(Config().model_dump(mode="json"))
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in defaults.items()}
    return [f"{key}={word}" for key, word in sorted(words.items()) if key.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override single keys.", autocompletion=_keys),
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Name that it answers to beside its own, as behind a proxy; may be repeated.",
    ),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run directory. Resumes what it holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for programs.")]


def new_display() -> Display:
    """What shows progress; imported when a command begins, for it takes time."""
    from pipeline.core.display import Display

    return Display()


@contextmanager
def loading(without: Sequence[str] = ()) -> Iterator[Display]:
    """Around a command's imports, which take seconds, and on a machine with other work much longer: `quick_imports`,
    shown on the display of the command."""
    display = new_display()
    with display.waiting("loading libraries"), quick_imports(without):
        yield display
