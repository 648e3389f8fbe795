"""What is written to terminals of several kinds, to files and in notebooks."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retriever_service import bars, console
from retriever_service.bars import in_words

ROOT = Path(__file__).resolve().parents[2]
SPEAK_OF_IT = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SPEAK_OF_IT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a message and a bar, which is waited for until it has said something, leave on standard error."""

    def run(file: io.StringIO | None = None, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        is_said = threading.Event()
        monkeypatch.setattr(bars, "EVERY_S", 0.01)
        monkeypatch.setattr(bars, "in_words", lambda task: is_said.set() or in_words(task))
        file = Terminal() if file is None else file
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", file)
            console.say("error: no such file", style="bold red")
            with console.progress("indexing", "passages") as advance:
                advance(1, 2)
                advance._progress.refresh()
                if advance._progress.disable:
                    assert is_said.wait(60)
        return file.getvalue()

    return run


def colours(text: str) -> set[int]:
    """Numbers of the escape sequences that colour."""
    numbers = {int(n) for codes in re.findall(r"\x1b\[([\d;]*)m", text) for n in codes.split(";") if n}
    return {n for n in numbers if 30 <= n <= 49 or 90 <= n <= 107}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_a_terminal_has_colours_and_bars(written: Any) -> None:
    text = written()
    assert 31 in colours(text) and "━" in text and "so far" not in text


def test_no_color_leaves_the_colours_out_and_nothing_else(written: Any) -> None:
    text = written(NO_COLOR="1")
    assert colours(text) == set()
    assert "error: no such file" in text and "━" in text


@pytest.mark.parametrize(
    ("file", "environment"),
    [(Terminal(), {"TERM": "dumb"}), (io.StringIO(), {}), (Terminal(), {"TTY_INTERACTIVE": "0"})],
    ids=["dumb terminal", "file", "not interactive"],
)
def test_where_nothing_can_be_drawn_over_there_are_lines(written: Any, file: Any, environment: Any) -> None:
    lines = plain(written(file, **environment)).splitlines()
    assert lines[0] == "error: no such file"
    assert re.fullmatch(r"indexing: 1 of 2 passages, \d:\d\d:\d\d so far", lines[1])
    assert re.fullmatch(r"indexing: \d+\.\d s", lines[-1])
    assert "" not in lines and "\x1b" not in "".join(lines)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if in one; gives what it is told to show."""
    shown: list[str] = []
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr("builtins.get_ipython", lambda: kernel, raising=False)
    package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    display.display = lambda what, **_: shown.append(getattr(what, "text", str(what)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def test_a_notebook_without_widgets_has_lines_and_no_warnings(written: Any, notebook: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written()
    lines = [plain(text).strip() for text in notebook]  # notebooks understand the sequences of colours
    assert lines[0] == "error: no such file"
    assert lines[1].startswith("indexing: 1 of 2 passages, ") and lines[1].endswith(" so far")


def test_a_notebook_with_widgets_has_bars(
    written: Any, notebook: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Output:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def clear_output(self, wait: bool) -> None: ...
        def close(self) -> None: ...

    widgets = types.ModuleType("ipywidgets")
    widgets.Output = Output  # type: ignore[attr-defined]
    widgets.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    written()
    assert any("1/2" in text for text in notebook)
    assert not any("so far" in text for text in notebook)


@pytest.mark.parametrize(
    ("environment", "has_colours", "has_escapes"),
    [({}, True, True), ({"NO_COLOR": "1"}, False, True), ({"TERM": "dumb"}, False, False)],
    ids=["terminal", "NO_COLOR", "dumb"],
)
@pytest.mark.parametrize("words", [["config", "nope=1"], ["index", "search"]], ids=["mistake", "usage"])
def test_the_program_keeps_to_the_terminal_that_it_runs_in(
    words: list[str], environment: dict[str, str], has_colours: bool, has_escapes: bool
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 65_536):
            text += part
    except OSError:  # the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == 2
    said = text.decode()
    assert "nope" in said or "Missing argument" in said
    assert (bool(colours(said)), "\x1b" in said) == (has_colours, has_escapes)
