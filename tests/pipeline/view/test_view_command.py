"""`exsearch view`: what it refuses, and the pages that it writes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipeline.view.pages import Pages
from tests.pipeline.commands_support import ROOT
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
    assert run_command("view", run, "--export", ".").exit_code == 2
    assert "is inside of the run" in run_command("view", run, "--export", run / "pages").stderr


def test_a_run_that_cannot_be_exported_leaves_nothing(run_command: Any, run: Path, folder: Path) -> None:
    (run / "test/best.parquet").write_bytes(b"no")
    result = run_command("view", run, "--export", "out")

    assert (result.exit_code, "test/best.parquet is damaged" in result.stderr) == (2, True)
    assert not list(folder.glob("*out*"))


def test_exported_pages_do_not_say_where_they_were_made(run_command: Any, run: Path, folder: Path) -> None:
    run_command("view", run, "--export", "out")

    for name in ("runs", "run/0"):
        text = (folder / f"out/data/{name}.js").read_text()
        assert str(run) not in text.partition('"config"')[0], name


def test_what_is_no_run_is_refused(run_command: Any, folder: Path) -> None:
    result = run_command("view", "model")

    assert (result.exit_code, "is not a run directory" in result.stderr) == (2, True)


def test_a_name_that_is_none_is_refused(run_command: Any, run: Path) -> None:
    result = run_command("view", run, "--allowed-host", "https://runs.example.org")

    assert (result.exit_code, "is no name of a host" in result.stderr) == (2, True)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.component
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_serves_until_it_is_interrupted(run: Path, host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("no IPv6 on loopback here")
    command = [sys.executable, "-m", "pipeline.cli", "view", str(run), "--host", host, "--port", "0"]
    command += ["--allowed-host", "runs.example.org"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().split()[1]
            for name in (urllib.parse.urlsplit(url).netloc, "runs.example.org"):
                asked = urllib.request.Request(f"{url}/api/rows/0/test-best/table/0", headers={"Host": name})
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    assert json.load(answer)["columns"]["em"] == [1, 0, 1]
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_port_that_is_taken_is_refused(run_command: Any, run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run_command("view", run, "--port", taken.getsockname()[1])

    assert (result.exit_code, "name another address or port" in result.stderr) == (2, True)
