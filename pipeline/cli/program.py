"""The program itself: what is installed, what is configured."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipeline.cli.options import AsJson, ConfigFile, Overrides, app, loading


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


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What is installed here, what the machine has, and what of it will not do (then the exit code is 1).

    Example: exsearch doctor --json
    """
    with loading():
        from pipeline.commands.doctor import doctor as look
        from pipeline.commands.doctor import in_words

    found = look()
    for line in [json.dumps(found, ensure_ascii=False)] if as_json else in_words(found):
        typer.echo(line)
    if found["problems"]:
        raise typer.Exit(1)


@app.command("config")
def show_config(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved configuration.

    Example: exsearch config --config configs/demo.yaml em.iterations=2
    """
    import yaml

    from pipeline.methods import load

    tree: dict[str, Any] = load(config, overrides or []).model_dump(mode="json")
    typer.echo(json.dumps(tree) if as_json else yaml.safe_dump(tree, sort_keys=False), nl=as_json)
