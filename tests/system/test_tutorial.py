"""docs/tutorial.md from its first command to its last, in an empty folder, as it stands there: but with fewer
questions, less to train, and a port that is free."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.serving import address_of
from pipeline.core.status import run_status

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SMALL = [
    *("data.train_limit=16", "data.dev_limit=8", "data.test_limit=8"),
    *("em.iterations=1", "evaluation.baselines=false", "rollout.workers=1", "rollout.kv_cache_gib=0.25"),
]


def commands() -> Iterator[list[str]]:
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line)


def saved(language: str, name: str) -> str:
    """The block behind the words that say under what name to save it."""
    return str(re.search(rf"as `{re.escape(name)}`.*?```{language}\n(.*?)```", PAGE, re.DOTALL)[1])  # type: ignore[index]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "tutorial").mkdir()
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "tutorial/prepare.py").write_text(saved("python", "tutorial/prepare.py"), encoding="utf-8")
    for name in ("tutorial/agent.yaml", "tutorial/real.yaml"):
        (tmp_path / name).write_text(saved("yaml", name), encoding="utf-8")
    return tmp_path


def test_every_command_of_the_tutorial_does_what_is_said(home: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}",
        "RAY_ADDRESS": "local",
        "PYTHONPATH": str(ROOT),
    }
    said: dict[str, str] = {}
    server: subprocess.Popen[bytes] | None = None
    try:
        for words in commands():
            command = " ".join(words[:2])
            if command in ("make setup", "export PATH=$PWD/.venv/bin:$PATH"):
                continue
            if command == "exsearch serve":
                with (home / "said").open("wb") as file:
                    server = subprocess.Popen([*words, "--port", "0"], cwd=home, env=environment, stderr=file)
                url = address_of(server, home / "said")
                continue
            if command == "exsearch train":
                words += SMALL
            elif command == "exsearch export":
                words += ["--iteration", "1"]  # so few steps need not make it better
            elif command == "exsearch view":
                words += ["--export", "tutorial/pages"]
            elif words[0] == "curl":
                words = [word.replace("http://127.0.0.1:8080", url) for word in words]
            done = subprocess.run(
                words, cwd=home, env=environment, capture_output=True, text=True, timeout=900, check=False
            )
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            said[" ".join(words[:3]) if words[1] == "index" else command] = done.stdout
        assert server is not None
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
    finally:
        if server is not None and server.poll() is None:
            server.kill()

    assert "Song of Lalter" in said["exsearch index search"]
    assert (run_status(home / "tutorial/run") or {})["state"] == "finished"
    assert (home / "tutorial/pages/index.html").exists() and (home / "tutorial/agent/agent.json").exists()
    assert "think" in said["exsearch ask"]
    (choice,) = json.loads(said["curl -s"])["choices"]
    assert (
        choice["message"]["content"] == said["exsearch ask"].splitlines()[-1].removeprefix(" answer ").strip()
    )
