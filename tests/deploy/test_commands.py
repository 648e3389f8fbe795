"""Commands of Ray, and of our scripts around it, that README and docs/ show: Ray's own parser takes them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.shown import PAGES, each_page

# Ray's own, when its parser is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCRIPTS = {"head.sh": ["start", "--head"], "worker.sh": ["start", "--address"]}
"""What a script of deploy/ray-start calls; the words behind it follow."""


@each_page
def test_commands_of_ray_that_are_shown_are_parsed_by_it(page: Path) -> None:
    for words in shown(page):
        command, name = subcommand(words)
        command.make_context(name, words)  # parses, and runs nothing


@each_page
def test_commands_of_ray_that_are_named_exist(page: Path) -> None:
    for inline in re.findall(r"`ray ([a-z][^`\n]*)`", page.read_text(encoding="utf-8")):
        subcommand(shlex.split(inline))


def test_a_wrong_option_would_be_noticed() -> None:
    words = ["job", "stop", "--no-such-option", "job-1"]
    command, name = subcommand(words)
    with pytest.raises(click.NoSuchOption):
        command.make_context(name, words)


def test_all_pages_submit_with_the_same_runtime_environment() -> None:
    submits = [words for page in PAGES for words in shown(page) if words[:2] == ["job", "submit"]]
    assert len(submits) >= 2
    for words in submits:
        assert words[words.index("--working-dir") + 1] == "."
        assert words[words.index("--runtime-env") + 1] == "deploy/runtime-env.yaml"
        assert "--runtime-env-json" not in words


def shown(page: Path) -> Iterator[list[str]]:
    """Words behind `ray`, in shell blocks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for words in re.findall(r"^(?:.* -- )?ray (.*)", block, re.MULTILINE):
            yield shlex.split(words, comments=True)
        for script, words in re.findall(r"^deploy/ray-start/(\S+)(.*)", block, re.MULTILINE):
            yield [*SCRIPTS[script], *shlex.split(words, comments=True)]


def subcommand(words: list[str]) -> tuple[click.Command, str]:
    """The command that is called; its name is taken off the words."""
    from ray.scripts.scripts import cli

    command, name = cli, "ray"
    while isinstance(command, click.Group) and words:
        name = words.pop(0)
        assert name in command.commands, f"ray has no command {name}"
        command = command.commands[name]
    return command, name
