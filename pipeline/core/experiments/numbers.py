"""The numbers that results are made of: all that is read from finished runs, and a file that keeps it without them.

`FOLDER/figures/NAME.parquet` stands beside the page. With it the runs can go: tables and plots are made again from it,
the experiment goes on elsewhere with what is missing, and others take runs of the very same settings from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.experiments.planned import PlannedRun
from pipeline.core.experiments.spec import FIGURES
from pipeline.core.question_scores import METRICS, Scores, read_scores
from pipeline.core.report import EVALUATION
from pipeline.core.run import what_it_computes, write_table
from pipeline.core.status import seconds_of

TOLD = ("searches", "gold_recall", "all_gold")
"""What a run records of a test that does not follow from its scores by question."""
SCHEMA = pa.schema(
    [
        ("settings", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("test", pa.string()),  # null: dev questions, after
        ("iteration", pa.int32()),
        ("tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("told", pa.struct([(name, pa.float64()) for name in TOLD])),  # of tests alone
        ("protocol", pa.string()),
        ("question_ids", pa.list_(pa.string())),
        ("questions", pa.list_(pa.string())),
        ("gold_answers", pa.list_(pa.list_(pa.string()))),
        ("answers", pa.list_(pa.string())),
        ("hops", pa.list_(pa.int32())),
        ("types", pa.list_(pa.string())),
        *((name, pa.list_(pa.float64())) for name in METRICS),
    ],
    metadata={b"exsearch.numbers": b"1"},
)
"""A row for each evaluation of a run."""


@dataclass(frozen=True, slots=True)
class Tested:
    """A test; `told` has the keys of `TOLD`, a value is None where nothing tells it."""

    scores: Scores
    told: Mapping[str, float | None]
    where: str


@dataclass(frozen=True, slots=True)
class Developed:
    """The dev questions after an iteration, the tokens generated for training and the seconds up to there."""

    iteration: int
    scores: Scores
    tokens: int
    seconds: float
    where: str


@dataclass(frozen=True, slots=True)
class RunNumbers:
    """What a finished run found out. `settings` names what it computed (`settings_of`), its seed included; `where` is
    what to look at where something is wrong with it."""

    settings: str
    seed: int
    tests: Mapping[str, Tested]
    points: tuple[Developed, ...]
    where: str


def settings_of(run: PlannedRun) -> str:
    """A name of what a run computes, the same wherever it is made. A model counts by its folder's name, the shared
    index by passages and encoder."""
    settings = what_it_computes(run.config)
    if run.index is not None:
        del settings["retriever.index"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def read_run(run: PlannedRun) -> RunNumbers:
    """Of a finished run, from its directory.

    Raises:
        UserError: its files are damaged or of an earlier version.
    """
    tests = {
        name: Tested(
            _scores(run.files.at(f"test/{name}.parquet")),
            {key: told[key] for key in TOLD},
            str(run.files.at(f"test/{name}.parquet")),
        )
        for name, told in run.files.test_results().items()
    }
    points, tokens, seconds = list[Developed](), 0, 0.0
    for t in range(run.config.of_recipe.iterations + 1):
        steps = run.files.steps(t)
        tokens += steps.get("sample", {}).get("generated_tokens", 0)
        seconds += seconds_of(steps.values())
        if EVALUATION in steps:
            path = run.files.at(f"{t}/{EVALUATION}.parquet")
            points.append(Developed(t, _scores(path), tokens, seconds, str(path)))
    return RunNumbers(settings_of(run), run.seed, tests, tuple(points), str(run.path))


def write_numbers(folder: Path, name: str, runs: Sequence[tuple[str, RunNumbers]]) -> Path:
    """Of the arms' runs, each with its arm's name, in their order. The same numbers give the same bytes."""
    path = folder / FIGURES / f"{name}.parquet"
    rows = [row for arm, run in runs for row in _rows(arm, run)]
    write_table(path, pa.Table.from_pylist(rows, SCHEMA), compression="zstd")  # small: it is published
    return path


def kept_numbers(folder: Path) -> dict[str, RunNumbers]:
    """The runs of all experiments whose numbers are kept in a folder of results, by their settings.

    Raises:
        UserError: a file of numbers is damaged, or another version's.
    """
    found: dict[str, RunNumbers] = {}
    for path in sorted((folder / FIGURES).glob("*.parquet")):
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path} is damaged ({error!s:.200}); copy it back, or remove it") from error
        if table.schema != SCHEMA:
            raise UserError(f"{path} was written by another version, or holds something else; move it away")
        by_run: dict[str, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            by_run.setdefault(row["settings"], []).append(row)
        found |= {settings: _run(rows, path) for settings, rows in by_run.items()}
    return found


def _scores(path: Path) -> Scores:
    found = read_scores(path)
    if found is None:
        what = "was written by an earlier version" if path.is_file() else "is not there"
        raise UserError(
            f"{path} {what}, so its run has no scores by question; remove the run, and it is made anew"
        )
    return found


def _rows(arm: str, run: RunNumbers) -> Iterator[dict[str, Any]]:
    of_run = {"settings": run.settings, "arm": arm, "seed": run.seed}
    for name, test in run.tests.items():
        yield {**of_run, "test": name, "told": test.told, **_columns(test.scores)}
    for point in run.points:
        costs = {"iteration": point.iteration, "tokens": point.tokens, "seconds": point.seconds}
        yield {**of_run, **costs, **_columns(point.scores)}


def _columns(scores: Scores) -> dict[str, Any]:
    numbers = {
        name: [None if np.isnan(value) else float(value) for value in scores.values[name]] for name in METRICS
    }
    return {
        "protocol": scores.protocol,
        "question_ids": scores.ids,
        "questions": scores.questions,
        "gold_answers": scores.gold_answers,
        "answers": scores.answers,
        "hops": scores.hops,
        "types": scores.types,
        **numbers,
    }


def _run(rows: Sequence[Mapping[str, Any]], path: Path) -> RunNumbers:
    where = f"{path}, {rows[0]['arm']}, seed {rows[0]['seed']}"
    tests, points = dict[str, Tested](), list[Developed]()
    for row in rows:
        scores = Scores(
            row["protocol"],
            row["question_ids"],
            row["questions"],
            row["gold_answers"],
            row["hops"],
            row["types"],
            row["answers"],
            {name: np.array(row[name], dtype=np.float64) for name in METRICS},
        )
        if row["test"] is not None:
            tests[row["test"]] = Tested(scores, row["told"], f"{where}, test {row['test']}")
        else:
            at = f"{where}, iteration {row['iteration']}"
            points.append(Developed(row["iteration"], scores, row["tokens"], row["seconds"], at))
    return RunNumbers(rows[0]["settings"], rows[0]["seed"], tests, tuple(points), where)
