"""`exsearch view`: what it refuses, and the pages that it writes."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from pipeline.view.pages import Pages
from tests.pipeline.view_support import Writer, asked


@pytest.fixture
def run(folder: Path) -> Path:
    writer = Writer(folder / "run", asked(3))
    writer.sampled(1)
    writer.evaluated("test/best", "101")
    return writer.path


def test_exported_pages_are_those_of_the_server(run_command: Any, run: Path, folder: Path) -> None:
    result = run_command("view", run, "--export", "out")

    assert result.exit_code == 0, result.output
    assert 'content="files"' in (folder / "out/index.html").read_text()
    pages = Pages([run], live=False)
    written = {
        str(p.relative_to(folder / "out/data").with_suffix("")) for p in (folder / "out/data").rglob("*.js")
    }
    assert written == set(pages.names())
    for name in written:
        call = re.fullmatch(
            r"ExSearch\.data\.put\((\"[^\"]+\"), (.*)\);\n", (folder / f"out/data/{name}.js").read_text()
        )
        assert call is not None and json.loads(call[1]) == name
        if name != "run/0":  # says how old it is
            assert json.loads(call[2]) == pages.page(name)


def test_a_folder_with_something_in_it_is_left_alone(run_command: Any, run: Path, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/mine.txt").write_text("mine")
    result = run_command("view", run, "--export", "out")

    assert (result.exit_code, "--export out is there already" in result.stderr) == (2, True)
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]
    assert not list(folder.glob(".out*"))


def test_what_is_no_run_is_refused(run_command: Any, folder: Path) -> None:
    result = run_command("view", "model")

    assert (result.exit_code, "is not a run directory" in result.stderr) == (2, True)


def test_a_port_that_is_taken_is_refused(run_command: Any, run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_command("view", run, "--port", taken.getsockname()[1])

    assert (result.exit_code, "name another address or port" in result.stderr) == (2, True)
