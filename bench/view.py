"""How `exsearch view` stands up to a large run: time until its pages answer, and the server's memory.

    python -m bench.view runs/demo --trajectories 1000000 [--directory DIR]

The samples of the first iteration of a finished run are written as often as it takes, under other ids, as shards of a
run of their own, with a file of their questions; and its answers to dev questions as a test of as many questions. A
server of it is started and asked, as a browser asks: for the run, then for the first lines of questions, for
trajectories here and there, and for all further lines. Prints a Markdown table: seconds until the answer, those of the
server's processor time, which say more on a machine that does other work as well, and the most anonymous memory
(`bench.memory`) up to then.
"""

from __future__ import annotations

import argparse
import json
import random
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

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from bench.measure import print_table
from bench.memory import anonymous, tree
from pipeline.core.data.questions import read_questions
from pipeline.core.records import Question
from pipeline.core.run import ROWS_PER_GROUP, read_json, write_json
from pipeline.core.shards import side_car_of, written_parts

SAMPLES, TEST = "0001-rollouts", "test-best"
LOOKS = 50
"""At trajectories."""
SAMPLE_S = 0.02
TIMEOUT_S = 600.0


def main() -> None:
    """Prints the table to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--trajectories", type=int, default=1_000_000, help="as many, or a few more")
    parser.add_argument("--directory", type=Path, help="where the large run is kept; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        large = arguments.directory or Path(scratch) / "large"
        if not large.exists():
            with Console(stderr=True).status("writing the large run"):
                multiply(arguments.run, large, arguments.trajectories)
        print_table("what; seconds; processor time (s); most memory (MiB)", list(measure(large)))


def multiply(run: Path, out: Path, trajectories: int) -> None:
    """Write shards of so many trajectories, made of those of the run's first iteration, and a test of their number of
    questions."""
    parts = list(written_parts(run / "iterations" / "0001" / "rollouts").values())
    folder = out / "iterations" / "0001" / "rollouts"
    folder.mkdir(parents=True)
    data = _with_own_questions(run, out)
    asked = {question.id: question for question in read_questions(data["train"], root=data["root"])}
    written = number = questions = 0
    with (out / "train.jsonl").open("w", encoding="utf-8") as lines:
        while written < trajectories:
            path, side_car = parts[number % len(parts)]
            round_ = f"{number // len(parts)}-"
            table, told = pq.read_table(path), read_json(side_car)
            assert told is not None
            shard = folder / f"{number:06d}.parquet"
            _write(shard, _renamed(table, round_, "question_id"))
            for examples in path.parent.parent.glob(f"*/examples/{path.name}"):
                copy = _renamed(pq.read_table(examples), round_, "id", "unit")
                _write(folder.parent / examples.parts[-3] / "examples" / shard.name, copy)
            tasks = [{**task, "id": round_ + task["id"]} for task in told["tasks"]]
            side_car_of(shard).write_text(json.dumps({**told, "tasks": tasks}), encoding="utf-8")
            for task in told["tasks"]:
                lines.write(_line(asked[task["id"]], round_))
            questions += len(tasks)
            written, number = written + table.num_rows, number + 1
    write_json(out / "iterations" / "0001" / "sample.json", {"stop_reasons": {}, "seconds": 1.0})
    answered = pq.read_table(run / "iterations" / "0001" / "evaluation.parquet")
    copies = (_renamed(answered, f"{n}-", "question_id") for n in range(questions // len(answered) + 1))
    _write(out / "test" / "best.parquet", pa.concat_tables(copies).slice(0, questions))
    write_json(out / "test" / "best.json", {"n": questions, "seconds": 1.0})


def _write(path: Path, table: pa.Table) -> None:
    """As `write_records` does, but for seeing to it that it is on the disk: there are thousands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)


def _with_own_questions(run: Path, out: Path) -> dict[str, Any]:
    """Write the configuration with the file of questions that is beside it; returns what stood there."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    data: dict[str, Any] = config["data"]
    own = {**data, "root": str(out.resolve()), "train": ["train.jsonl"], "dev": None, "test": None}
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "data": own}), encoding="utf-8")
    return data


def _line(question: Question, prefix: str) -> str:
    row = {
        "id": prefix + question.id,
        "question": question.text,
        "answers": question.answers,
        "type": question.type,
        "hops": question.hops,
        "supporting_ids": question.supporting_ids,
    }
    return json.dumps(row) + "\n"


def _renamed(table: pa.Table, prefix: str, *columns: str) -> pa.Table:
    for name in columns:
        values = pc.binary_join_element_wise(prefix, table.column(name), "").cast(pa.string())
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def measure(run: Path) -> Iterator[list[str]]:
    """A row for each thing that a browser asks for."""
    begun = time.perf_counter()
    with served(run) as (url, server, memory):

        def ask(*names: str) -> Any:
            for name in names:
                with urllib.request.urlopen(f"{url}/api/{name}", timeout=TIMEOUT_S) as answer:
                    found = json.load(answer)
            return found

        def used() -> float:
            times = server.cpu_times()
            return float(times.user + times.system)

        def row(what: str, seconds: float, processor: float) -> list[str]:
            return [what, f"{seconds:.2f}", f"{processor:.2f}", f"{memory[0] / 2**20:,.0f}"]

        def timed(what: str, *names: str) -> list[str]:
            begun, before = time.perf_counter(), used()
            ask(*names)
            seconds, processor = (time.perf_counter() - begun) / len(names), (used() - before) / len(names)
            return row(what, seconds, processor)

        sources = {source["key"]: source for source in ask("run/0")["sources"]}
        yield row("start, until the page of the run is there", time.perf_counter() - begun, used())
        ask(f"details/0/{SAMPLES}/000000/0")  # tokenizer and file of questions
        yield row("and all is read that is read once", time.perf_counter() - begun, used())
        parts = [part["name"] for part in sources[SAMPLES]["parts"]]
        rows = sum(part["rows"] for part in sources[SAMPLES]["parts"])
        questions, spread = sources[TEST]["parts"][0]["rows"], sources[SAMPLES]["spread"]
        some = random.Random(0).choices(parts, k=LOOKS)
        yield timed("the page of the run again", "run/0")
        yield timed(f"first lines of {questions:,} test questions", f"rows/0/{TEST}/table/0")
        yield timed("further lines of them", f"rows/0/{TEST}/table/{questions // 2048}")
        yield timed("answers to 16 of them", f"details/0/{TEST}/table/{questions // 32}")
        yield timed(
            "lines of the training questions of a shard, mean",
            *(f"rows/0/{SAMPLES}/{part}/0" for part in some),
        )
        yield timed("trajectories of 16 of them, mean", *(f"details/0/{SAMPLES}/{part}/0" for part in some))
        yield timed("where a training question is, at first", f"ids/0/{SAMPLES}/{spread}/0")
        yield timed("where another one is", f"ids/0/{SAMPLES}/{spread}/{spread - 1}")
        begun, before = time.perf_counter(), used()
        ask(*(f"rows/0/{SAMPLES}/{part}/0" for part in parts))
        what = f"all lines of {rows:,} trajectories in {len(parts):,} shards"
        yield row(what, time.perf_counter() - begun, used() - before)


@contextmanager
def served(run: Path) -> Iterator[tuple[str, psutil.Process, list[int]]]:
    """The address of a server of the run, its process, and its most memory in bytes, which grows as long as the server
    lives."""
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
            yield process.stderr.readline().split()[1], psutil.Process(process.pid), memory
        finally:
            ended.set()
            watcher.join()
            process.terminate()


if __name__ == "__main__":
    main()
