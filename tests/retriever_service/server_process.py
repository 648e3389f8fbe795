"""Real servers of an index or an agent, each in a process of its own on the loopback address."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def index_server(index: Path, token: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`exsearch index serve`. It listens when the address is given, and may still be loading."""
    command = ["-m", "pipeline.cli", "index", "serve", "--index", str(index), "--port", "0"]
    with _listening(command, os.environ | {"EXSEARCH_TOKEN": token}) as found:
        yield found


@contextmanager
def agent_server(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`exsearch serve` with these arguments. It listens when the address is given, and may still be loading."""
    with _listening(["-m", "pipeline.cli", "serve", "--port", "0", *arguments], dict(os.environ)) as found:
        yield found


@contextmanager
def search_r1_server(index: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server of the published Search-R1 design. It is loaded when it listens."""
    program = (
        "import sys; from pathlib import Path; from bench.search_r1_server import serve;"
        "serve(Path(sys.argv[1]), lambda url: print(url, file=sys.stderr, flush=True))"
    )
    with _listening(["-c", program, str(index)], dict(os.environ)) as found:
        yield found


@contextmanager
def _listening(
    arguments: Sequence[str], environment: dict[str, str]
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            written = ""
            for line in process.stderr:
                written += line
                if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield address[0], process
                    break
            else:
                raise AssertionError(f"the server ended: {written}")
        finally:
            process.kill()
