"""Commands that pages, messages and help texts show: read as a shell reads them, and parsed by the program that they
call, up to its work and not including it."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from pipeline.cli import app
from pipeline.core.benchmarks.spec import read_benchmark
from pipeline.core.config.loading import is_override
from pipeline.core.shipped import CONFIGS, find_shipped
from pipeline.methods import load

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

OF_OTHERS = {"curl", "docker", "export", "grep", "kubectl", "ray", "sbatch", "scancel", "tensorboard"}
"""Programs that are not ours. What `ray` is called with is parsed in tests/deploy/test_commands.py."""


def all_commands(group: TyperGroup | None = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of the command line with its name ("index build"), groups of commands among them."""
    if group is None:
        group = typer.main.get_command(app)  # type: ignore[assignment]
    assert group is not None
    for name, command in group.commands.items():
        yield f"{before}{name}", command
        if isinstance(command, TyperGroup):
            yield from all_commands(command, f"{before}{name} ")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def saved_files() -> dict[str, str]:
    """By its name each file that a page tells the reader to save: the block behind the words "saved as"."""
    found: dict[str, str] = {}
    for page in PAGES:
        pattern = r"[Ss]ave(?:d| this) as `([\w./-]+)`(?:(?!```).)*```(?:yaml|python)\n(.*?)```"
        for name, text in re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL):
            assert name not in found, f"{page.name}: {name} is saved on another page as well"
            found[name] = text
    return found


def commands_in(shell: str) -> Iterator[list[str]]:
    """The words of each command, those of a line that are joined by `|` or `&&` one by one. Comments, variables in
    front, redirections and an ellipsis are left out; what `ray`, `kubectl` or `sbatch` is given to run follows it."""
    for line in shell.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word not in ("|", "&&"):
                words.append(word)
                continue
            words = [w for w in _without_redirections(words) if w != "..."]
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]
            if words:
                yield words
                yield from _handed_on(words)
            words = []


def _without_redirections(words: Sequence[str]) -> list[str]:
    pairs = zip(["", *words], words, strict=False)
    return [word for before, word in pairs if word not in ("<", ">") and before not in ("<", ">")]


def _handed_on(words: Sequence[str]) -> Iterator[list[str]]:
    if words[0] in ("ray", "kubectl") and "--" in words:
        yield list(words[words.index("--") + 1 :])
    elif words[0] == "sbatch":
        yield ["exsearch", *words[2:]]


# ---------------------------------------------------------------- parsing


@dataclass(frozen=True)
class Parsed:
    """A command of ours: its name ("index build") and what its parameters became."""

    name: str
    parameters: dict[str, Any]


def check(words: Sequence[str]) -> None:
    """Parse a command in the current directory, which has the files that it names as configurations.

    Raises:
        AssertionError, Exception: whatever the parser of the program says.
    """
    match list(words):
        case ["exsearch", *rest] | ["python", "-m", "pipeline.cli", *rest]:
            check_settings(parsed(rest))
        case ["python", "-m", "retriever_service", *rest]:
            parsed(["index", *rest])
        case ["make", *rest]:
            for line in recipe(rest):
                check(line)
        case ["python", "-m", "pytest", *rest]:
            assert [path for path in rest if path.endswith(".py") and not (ROOT / path).exists()] == []
        case ["python", "-m", module, *rest]:
            check_arguments(module, rest)
        case ["python", script, *rest] if script.startswith("scripts/"):
            check_arguments(script, rest)
        case ["python", script, *_]:
            assert script in saved_files(), f"no page saves {script}"
        case [program, *_]:
            known = program in OF_OTHERS or program.startswith(("deploy/", ".venv/bin/"))
            assert known, f"what is {program}?"


def parsed(words: Sequence[str]) -> Parsed:
    """By the command line itself: options, their types, what is required."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("exsearch", list(words))
    names = []
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
        names.append(name)
    return Parsed(" ".join(names), context.params)


def check_settings(command: Parsed) -> None:
    """The keys, files and names among the parameters, by what reads them."""
    given = command.parameters
    if command.name == "benchmark":
        read_benchmark(find_shipped("benchmarks", given["which"]), given["settings"] or [])
        return
    question = given.get("question")
    keys = [*([question] if question and is_override(question) else []), *(given.get("overrides") or [])]
    load(given.get("config"), keys)
    if command.name == "experiment" and not Path(given["which"]).suffix:
        assert (CONFIGS / "experiments" / f"{given['which']}.yaml").is_file(), given["which"]


def recipe(words: Sequence[str]) -> list[list[str]]:
    """The commands that `make` would run, the environment being there."""
    variables = [word for word in words if "=" in word]
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in (word.split("=")[0] for word in variables):
        assert f"{name} ?=" in text or f"$({name})" in text, f"the Makefile does not look at {name}"
    device = [] if any(word.startswith("DEVICE=") for word in variables) else ["DEVICE=cpu"]
    ready = [option for device in ("cpu", "gpu") for option in ("-o", f".venv/.ready-{device}")]
    done = subprocess.run(
        ["make", "--dry-run", *ready, *device, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(".venv/bin/")]
    programs = ("exsearch", "python")
    found = [shlex.split(line.removeprefix(".venv/bin/")) for line in lines]
    return [line for line in found if line[0] in programs]


class _Parsed(Exception):
    """The arguments are accepted."""


def check_arguments(program: str, words: Sequence[str]) -> None:
    """A module (bench.estep) or script of ours: its own parser takes the words, or it has none and there are none."""
    if program.endswith(".py"):
        path = ROOT / program
    else:
        spec = importlib.util.find_spec(f"{program}.__main__" if _is_package(program) else program)
        assert spec is not None and spec.origin is not None, f"there is no {program}"
        path = Path(spec.origin)
    if "ArgumentParser(" not in path.read_text(encoding="utf-8"):
        assert not words, f"{program} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise _Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(path), *words])
        with pytest.raises(_Parsed):
            runpy.run_path(str(path), run_name="__main__")


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None
