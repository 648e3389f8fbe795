"""From the command to the first trajectory of a run, against one engine that starts and answers by itself.

The run is the demo, with its index ready: engines, retriever, weighting actor and checks start, and then the base model
answers one test question. It is interrupted as soon as that is scored. (The first of 300 comes late: they share the
engines.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import ROOT, TINY, Ratio, in_turn

LONGEST_S = 600.0
ALONE = """
import sys
from bench.gpu.hosted import engine_options, hosted
from pipeline.core.agents.program import Sampling

if __name__ == "__main__":
    with hosted(engine_options(sys.argv[1], "cpu", max_model_len=1536, max_num_seqs=256)) as host:
        host.run(host.engine.generate([1, 2, 3], Sampling(0.0, max_tokens=1)))
        print("answered", flush=True)
        sys.stdin.read()
"""
FIRST = Path("test") / "base.json"
"""What is written in a run directory when the first questions are answered."""


def run() -> list[Ratio]:
    """Starts per second."""
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        (at / "alone.py").write_text(ALONE)
        demo = _Demo(at)
        ours, limit = in_turn(demo.start, lambda: _alone(at / "alone.py"))
    goal = 1 / 1.2
    return [Ratio("start of a run until its first answer", "one engine alone", "starts", ours, limit, goal)]


def _alone(script: Path) -> float:
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(script), str(TINY)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    if "answered\n" not in process.stdout:  # vLLM says other things there
        raise RuntimeError("the engine did not answer")
    seconds = time.perf_counter() - start
    process.communicate()
    return 1 / seconds


class _Demo:
    def __init__(self, at: Path) -> None:
        self._at, self._number = at, 0
        self._overrides = ["data.test_limit=1"]

    def start(self) -> float:
        """Every run is a new one; all but the first have its index."""
        run = self._at / f"run-{self._number}"
        self._number += 1
        command = [sys.executable, "-m", "pipeline.cli", "demo", "--run", str(run), *self._overrides]
        began = time.perf_counter()
        with (self._at / "said.log").open("ab") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
        while not (run / FIRST).exists():
            if process.poll() is not None or time.perf_counter() - began > LONGEST_S:
                process.kill()
                raise RuntimeError((self._at / "said.log").read_text()[-2000:])
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGINT)
        process.wait()
        if self._number == 1:
            self._overrides.append(f"retriever.index={run / 'index'}")
        return 1 / seconds
