"""A benchmark from its settings to its report. What was ranked before is not ranked again.

OUT/benchmark.yaml       the settings
OUT/corpora/, indexes/   see `corpora`
OUT/rankings/            see `cells`
OUT/results.parquet      a row per query, retriever and arm, with its measures
OUT/report.json          the figures (`summary`), and what was counted
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipeline.core.benchmarks.cells import (
    Cell,
    is_finished,
    made_of,
    measure,
    models_of,
    read_rankings,
    write_rankings,
)
from pipeline.core.benchmarks.constraints import KINDS, generate_constraints
from pipeline.core.benchmarks.corpora import BenchmarkCorpus, Encoders
from pipeline.core.benchmarks.queries import Query, TaskQueries, read_task
from pipeline.core.benchmarks.searching import Ranking, TaskSearcher
from pipeline.core.benchmarks.spec import CONSTRAINTS, Arm, Benchmark, SearchConfig
from pipeline.core.benchmarks.summary import summarise
from pipeline.core.display import Advance, Display
from pipeline.core.errors import UserError
from pipeline.core.run import Json, write_atomically, write_json, write_table
from retriever_service.encoding.encoder import BUNDLED_MODEL, Encoder, LoadEncoder
from retriever_service.files import exclusive
from retriever_service.search.rerank import Reranker

logger = logging.getLogger(__name__)

SETTINGS_FILE, REPORT_FILE, RESULTS_FILE = "benchmark.yaml", "report.json", "results.parquet"


@dataclass(frozen=True, slots=True)
class Task:
    """A task with all that it needs."""

    name: str
    domain: str
    corpus: BenchmarkCorpus
    asked: TaskQueries
    exclude_same_id: bool = False

    def arms(self, wanted: Sequence[Arm]) -> list[Arm]:
        """Those that say something of it: without instructions there is nothing to compare."""
        return [arm for arm in wanted if arm == "without" or self.asked.has_instructions]


def read_tasks(spec: Benchmark, out: Path) -> tuple[list[Task], Json]:
    """All tasks of a benchmark, and by generated task the questions that are left out.

    Raises:
        UserError, RetrieverError: a file that is missing or wrong.
    """
    for path in _files_of(spec):
        if not path.is_file():
            raise UserError(
                f"there is no file {path}; relative paths start from root ({spec.root}): give root=DIR"
            )
    for search in spec.retrievers.values():
        for model in filter(None, (search.encoder_name, search.rerank)):
            if model != BUNDLED_MODEL and model.startswith(("/", ".")) and not Path(model).is_dir():
                raise UserError(f"there is no model folder {model}")
    read = {name: read_task(task, Path(spec.root), spec.seed) for name, task in spec.tasks.items()}
    corpora = {
        name: BenchmarkCorpus.of_files(name, [spec.path(source) for source in sources], out)
        for name, sources in spec.corpora.items()
    }
    tasks = [
        Task(name, task.domain, corpora[task.corpus], read[name], task.exclude_same_id)
        for name, task in spec.tasks.items()
    ]
    if spec.constraints is None:
        return tasks, {}
    if taken := [kind for kind in KINDS if kind in spec.tasks]:
        raise UserError(f"tasks.{taken[0]} is the name of a generated task; give yours another one")
    made = generate_constraints(spec.constraints)
    corpus = BenchmarkCorpus.of_passages(CONSTRAINTS, made.responses, out)
    generated = [Task(kind, CONSTRAINTS, corpus, asked) for kind, asked in made.tasks.items()]
    return [*tasks, *generated], made.left_out


def _files_of(spec: Benchmark) -> Iterator[Path]:
    for sources in spec.corpora.values():
        yield from map(spec.path, sources)
    for task in spec.tasks.values():
        yield from (spec.path(name) for name in (task.queries, task.qrels) if name is not None)


def run_benchmark(spec: Benchmark, out: Path, display: Display, *, load: LoadEncoder | None = None) -> Json:
    """Search what is left, and report; returns the report.

    Args:
        load: how an encoder is loaded; None for sentence-transformers.

    Raises:
        UserError, RetrieverError: bad input, before anything is searched; or a folder that holds something else.
    """
    if out.exists() and not (out.is_dir() and ((out / SETTINGS_FILE).is_file() or not any(out.iterdir()))):
        raise UserError(f"{out} is not empty and holds no benchmark; choose another --out")
    tasks, left_out = read_tasks(spec, out)
    if not any(task.arms(spec.arms) for task in tasks):
        raise UserError(
            "arms is `with` alone, and no task has an instruction; give instructions, or arms: [without]"
        )
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / "lock"):
        settings = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=False)
        write_atomically(out / SETTINGS_FILE, settings)
        searching = _Searching(spec, out, display, load or Encoder.load)
        for name, search in spec.retrievers.items():
            searching.all_of(name, search, tasks)
        return _report(spec, out, tasks, left_out, searching)


class _Searching:
    """Fills the cells that are not there yet, and counts those that were searched, kept and made again."""

    def __init__(self, spec: Benchmark, out: Path, display: Display, load: LoadEncoder) -> None:
        self._spec, self._out, self._display = spec, out, display
        self._load = Encoders(load)
        self.searched = self.kept = self.outdated = 0

    def all_of(self, name: str, search: SearchConfig, tasks: Sequence[Task]) -> None:
        """All cells of one retriever, corpus by corpus."""
        left = [
            (task, cell, identity)
            for task, cell, identity in self._cells(name, search, tasks)
            if self._is_left(cell, identity)
        ]
        if not left:
            return
        reranker = None if search.rerank is None else Reranker.open(search.rerank, self._spec.device)
        by_corpus: dict[str, list[tuple[Task, Cell, str]]] = {}
        for one in left:
            by_corpus.setdefault(one[0].corpus.name, []).append(one)
        for corpus, of_corpus in by_corpus.items():
            searcher = self._open(search, corpus, of_corpus, reranker)
            total = sum(len(task.asked.queries) for task, _, _ in of_corpus)
            with self._display.progress(f"{name}: searching {corpus}", total, "queries") as advance:
                for task, cell, identity in of_corpus:
                    rankings = self._rank(searcher, task, cell.arm, advance)
                    write_rankings(cell.path(self._out), identity, task.asked.queries, rankings)
                    self.searched += 1

    def _cells(
        self, name: str, search: SearchConfig, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Cell, str]]:
        models = models_of(search, self._spec.device)
        for task in tasks:
            for arm in task.arms(self._spec.arms):
                identity = made_of(
                    search,
                    models,
                    arm,
                    task.asked.queries,
                    task.corpus.digest,
                    self._spec.depth,
                    exclude_same_id=task.exclude_same_id,
                )
                yield task, Cell(name, task.name, arm), identity

    def _is_left(self, cell: Cell, identity: str) -> bool:
        finished = is_finished(cell.path(self._out), identity)
        if finished:
            self.kept += 1
        elif finished is None:
            self.outdated += 1
            logger.info(f"{cell}: made again, for what it was made of has changed")
        return not finished

    def _open(
        self,
        search: SearchConfig,
        corpus: str,
        left: Sequence[tuple[Task, Cell, str]],
        reranker: Reranker | None,
    ) -> TaskSearcher:
        depth = self._spec.depth + any(task.exclude_same_id for task, _, _ in left)
        with self._display.progress(f"{corpus}: passages", None, "encoded") as advance:
            return TaskSearcher(
                search,
                left[0][0].corpus,
                depth=depth,
                load=self._load,
                device=self._spec.device,
                reranker=reranker,
                on_progress=advance.to,
            )

    def _rank(self, searcher: TaskSearcher, task: Task, arm: Arm, advance: Advance) -> list[Ranking]:
        rankings = searcher.rank(task.asked.queries, arm, advance)
        if task.exclude_same_id:
            rankings = [
                [hit for hit in found if hit[0] != query.id]
                for query, found in zip(task.asked.queries, rankings, strict=True)
            ]
        return [found[: self._spec.depth] for found in rankings]


def _report(spec: Benchmark, out: Path, tasks: Sequence[Task], left_out: Json, searching: _Searching) -> Json:
    rows: list[Json] = []
    figures = {}
    for name in spec.retrievers:
        values: dict[str, dict[Arm, dict[str, list[float]]]] = {}
        for task in tasks:
            for arm in task.arms(spec.arms):
                rankings = read_rankings(Cell(name, task.name, arm).path(out))
                found = measure(task.asked.queries, rankings, spec.measures)
                values.setdefault(task.name, {})[arm] = found
                rows += _rows(task, name, arm, found)
        domains = {task.name: task.domain for task in tasks}
        figures[name] = summarise(values, domains, spec.measures, spec.bootstrap_samples, spec.seed)
    write_table(out / RESULTS_FILE, pa.Table.from_pylist(rows), "zstd")
    report = {
        "title": spec.title,
        "measures": list(spec.measures),
        "arms": list(spec.arms),
        "tasks": {task.name: _counts(task, left_out.get(task.name, 0)) for task in tasks},
        "cells": {"searched": searching.searched, "kept": searching.kept, "outdated": searching.outdated},
        "retrievers": figures,
    }
    write_json(out / REPORT_FILE, report)
    return report


def _rows(task: Task, retriever: str, arm: Arm, found: Mapping[str, Sequence[float]]) -> Iterable[Json]:
    for place, query in enumerate(task.asked.queries):
        yield {
            "task": task.name,
            "domain": task.domain,
            "retriever": retriever,
            "arm": arm,
            "query_id": query.id,
            "instructed": arm == "with" and bool(query.instruction),
            **{name: of[place] for name, of in found.items()},
        }


def _counts(task: Task, left_out: int) -> dict[str, Any]:
    """What was asked of a task, and what was not."""
    there = task.corpus.passages().column("id")
    queries: Sequence[Query] = task.asked.queries
    gold = pa.array([id_ for query in queries for id_ in query.relevant], there.type)
    return {
        "domain": task.domain,
        "corpus": task.corpus.name,
        "passages": len(there),
        "queries": len(queries),
        "without_instruction": sum(not query.instruction for query in queries),
        "without_relevant": sum(not query.relevant for query in queries),
        "relevant": len(gold),
        "relevant_not_in_corpus": len(gold.filter(pc.invert(pc.is_in(gold, value_set=there)))),
        "unjudged": task.asked.unjudged,
        "unknown": task.asked.unknown,
        "not_drawn": task.asked.not_drawn,
        "left_out": left_out,
    }
