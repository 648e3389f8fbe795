"""What the commands are added to."""

from __future__ import annotations

import typer

from retriever_service.console import Commands

app = typer.Typer(
    cls=Commands,
    help="Encode, build, search, update and serve retrieval indexes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
