"""How `exsearch view` stands up to a large run: time until its pages answer, and the server's memory.

    python -m bench.view runs/demo --trajectories 100000 [--directory DIR]

The samples of the first iteration of a finished run are written as often as it takes, under other ids, as shards of a
run of their own. A server of it is started and asked, as a browser asks: for the run, then for the first lines of
questions, for all further ones, and for trajectories here and there. Prints a Markdown table; memory is the most
anonymous memory (`bench.memory`) up to then.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from bench.measure import print_table
from bench.memory import anonymous, tree
from pipeline.core.run import read_json, write_json, write_table
from pipeline.core.shards import side_car_of, written_parts

SOURCE = "0001-rollouts"
LOOKS = 50
"""At trajectories."""
SAMPLE_S = 0.02
TIMEOUT_S = 60.0


def main() -> None:
    """Prints the table to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--trajectories", type=int, default=100_000, help="as many, or a few more")
    parser.add_argument("--directory", type=Path, help="where the large run is kept; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        large = arguments.directory or Path(scratch) / "large"
        if not large.exists():
            with Console(stderr=True).status("writing the large run"):
                multiply(arguments.run, large, arguments.trajectories)
        print_table("what; seconds; most memory (MiB)", list(measure(large)))


def multiply(run: Path, out: Path, trajectories: int) -> None:
    """Write shards of so many trajectories, made of those of the run's first iteration."""
    parts = list(written_parts(run / "iterations" / "0001" / "rollouts").values())
    folder = out / "iterations" / "0001" / "rollouts"
    folder.mkdir(parents=True)
    shutil.copy(run / "config.yaml", out)
    written = number = 0
    while written < trajectories:
        path, side_car = parts[number % len(parts)]
        round_ = f"{number // len(parts)}-"
        table, told = pq.read_table(path), read_json(side_car)
        assert told is not None
        shard = folder / f"{number:06d}.parquet"
        write_table(shard, _renamed(table, round_, "question_id"))
        for examples in path.parent.parent.glob(f"*/examples/{path.name}"):
            copy = _renamed(pq.read_table(examples), round_, "id", "unit")
            write_table(folder.parent / examples.parts[-3] / "examples" / shard.name, copy)
        write_json(
            side_car_of(shard), {**told, "tasks": [{**t, "id": round_ + t["id"]} for t in told["tasks"]]}
        )
        written, number = written + table.num_rows, number + 1
    write_json(out / "iterations" / "0001" / "sample.json", {"stop_reasons": {}, "seconds": 1.0})


def _renamed(table: pa.Table, prefix: str, *columns: str) -> pa.Table:
    for name in columns:
        values = pc.binary_join_element_wise(prefix, table.column(name), "").cast(pa.string())
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def measure(run: Path) -> Iterator[list[str]]:
    """A row for each thing that a browser asks for."""
    begun = time.perf_counter()
    with served(run) as (url, memory):

        def ask(name: str) -> Any:
            with urllib.request.urlopen(f"{url}/api/{name}", timeout=TIMEOUT_S) as answer:
                return json.load(answer)

        def row(what: str, seconds: float) -> list[str]:
            return [what, f"{seconds:.2f}", f"{memory[0] / 2**20:,.0f}"]

        (source,) = [one for one in ask("run/0")["sources"] if one["key"] == SOURCE]
        parts = source["parts"]
        rows = sum(part["rows"] for part in parts)
        yield row("start, until the page of the run is there", time.perf_counter() - begun)
        begun = time.perf_counter()
        ask(f"rows/0/{SOURCE}/{parts[0]['name']}")
        yield row("first lines of questions", time.perf_counter() - begun)
        begun = time.perf_counter()
        for part in parts[1:]:
            ask(f"rows/0/{SOURCE}/{part['name']}")
        yield row(f"all lines of {rows:,} trajectories in {len(parts)} shards", time.perf_counter() - begun)
        begun = time.perf_counter()
        ask(f"ids/0/{SOURCE}")
        yield row("where each question is", time.perf_counter() - begun)
        ask(f"details/0/{SOURCE}/{parts[0]['name']}/0")  # the tokenizer
        begun = time.perf_counter()
        for part in random.Random(0).choices(parts, k=LOOKS):
            ask(f"details/0/{SOURCE}/{part['name']}/0")
        yield row("trajectories of a question, mean", (time.perf_counter() - begun) / LOOKS)


@contextmanager
def served(run: Path) -> Iterator[tuple[str, list[int]]]:
    """The address of a server of the run, and its most memory in bytes, which grows as long as the server lives."""
    command = [sys.executable, "-m", "pipeline.cli", "view", str(run), "--port", "0"]
    memory, ended = [0], threading.Event()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:

        def watch() -> None:
            while not ended.wait(SAMPLE_S):
                memory[0] = max(memory[0], sum(map(anonymous, tree(process.pid))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert process.stderr is not None
            yield process.stderr.readline().split()[1], memory
        finally:
            ended.set()
            watcher.join()
            process.terminate()


if __name__ == "__main__":
    main()
