"""What a person sees: progress, status lines and tables on the terminal; everything else goes to the run's log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.core.progress import PROGRESS_FILE, ActorKind, Move, ProgressFile
from pipeline.core.report import Column, Outcome, in_order
from pipeline.core.scoring.answers import METRICS
from pipeline.core.tables import narrow_table, number, selection_table, span, tests_table
from retriever_service.bars import Bars

logger = logging.getLogger(__name__)

LOG_FILE = "run.log"
STARTED = "a process begins to work on this run"
"""Its first line in the log."""


class Advance:
    """Moves one progress bar: call it with a number of finished things, or `to(done, total)`.

    Where it turns out only later that a phase did not begin at nothing, `to(done, total, begun_at)` says so.

    Args:
        move: told the same.
    """

    def __init__(self, progress: Progress, task: TaskID, move: Move) -> None:
        self._progress, self._task, self._move = progress, task, move

    def __call__(self, count: int) -> None:
        self._progress.advance(self._task, count)
        self._tell()

    def to(self, done: float, total: float, begun_at: float | None = None) -> None:
        self._progress.update(self._task, completed=done, total=total)
        self._tell(begun_at)

    def _tell(self, begun_at: float | None = None) -> None:
        (task,) = (task for task in self._progress.tasks if task.id == self._task)
        self._move(task.completed, task.total, begun_at)


class _Counted(ProgressColumn):
    """A column of what is counted; empty beside what is only waited for."""

    max_refresh = 0.5  # as rich's own time columns

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column(task) if task.fields["unit"] is not None else ""


class _LogFile(logging.FileHandler):
    """The run's log. A full disk is heard of by what cannot go on without it, not by a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class Display:
    """The terminal of one command. Where it is none (a log file, a job), finished steps are plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress_file: ProgressFile | None = None
        self._bars: Progress | None = None
        """Of all that goes on; None while nothing does."""

    @contextmanager
    def progress(self, description: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Advance]:
        """A bar while the block runs, which begins at `done`; afterwards one line with how long it took."""
        with (
            self._told(description, total, unit, done) as move,
            self._shown(description, total, unit, done) as (bars, task),
        ):
            yield Advance(bars, task, move)

    @contextmanager
    def status(self, description: str) -> Iterator[None]:
        """A spinner while the block runs; afterwards one line with how long it took."""
        with self._told(description, None, None), self._shown(description, None, None):
            yield

    @contextmanager
    def waiting(self, description: str) -> Iterator[None]:
        """A spinner while the block runs, of which nothing stays."""
        with self._bar(description, None, None):
            yield

    @contextmanager
    def changing(self, description: str) -> Iterator[Callable[[str], None]]:
        """As `status`; what it gives shows further words behind the description."""
        with self._shown(description, None, None) as (bars, task):
            yield lambda words: bars.update(task, description=f"{description}: {words}")

    @contextmanager
    def _shown(
        self, description: str, total: int | None, unit: str | None, done: int = 0
    ) -> Iterator[tuple[Progress, TaskID]]:
        """As `_bar`; afterwards one line with how long it took."""
        start = time.perf_counter()
        with self._bar(description, total, unit, done) as shown:
            yield shown
        self.line(f"{description}: {time.perf_counter() - start:.1f} s")

    @contextmanager
    def _bar(
        self, description: str, total: int | None, unit: str | None, done: int = 0
    ) -> Iterator[tuple[Progress, TaskID]]:
        """A line among those of all that goes on: blocks may overlap in any order."""
        if self._bars is None:
            counted = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                *(_Counted(column) for column in counted),
                TimeElapsedColumn(),
                _Counted(TimeRemainingColumn()),
                console=self.console,
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(description, total=total, completed=done, unit=unit)
        try:
            yield bars, task
        finally:
            bars.remove_task(task)
            if not bars.tasks:
                bars.stop()
                self._bars = None

    @contextmanager
    def _told(self, description: str, total: int | None, unit: str | None, done: int = 0) -> Iterator[Move]:
        """The phase in the run's progress file as well, if this is a run."""
        if self._progress_file is None:
            yield lambda done, total, begun_at: None
            return
        with self._progress_file.phase(description, total, unit, done) as move:
            yield move

    def restarted(self, kind: ActorKind) -> None:
        """An actor took the place of a lost one: for the run's progress file alone, the log has said why."""
        if self._progress_file is not None:
            self._progress_file.restarted(kind)

    def line(self, text: str) -> None:
        """Print text as it is; the terminal wraps it, so that paths and commands can be copied. Logged too."""
        logger.info(text)
        self._print(text)

    def error(self, text: str) -> None:
        self._print(f"error: {text}", style="bold red")

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def log_to(self, path: Path) -> None:
        """Send the log of this process to a file, and warnings also to the terminal."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LogFile(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[file, terminal], force=True)

    @contextmanager
    def follow(self, run: Path) -> Iterator[None]:
        """Log and progress go to the run directory while the block runs, and how it ended: see `core.status`."""
        self.log_to(run / LOG_FILE)
        logger.info(STARTED)
        file = self._progress_file = ProgressFile(run / PROGRESS_FILE)
        try:
            yield
        except KeyboardInterrupt:
            logger.info("interrupted")
            file.end("interrupted", None)
            raise
        except BaseException as error:
            # For the file alone: the command line prints it as well.
            logger.info("the run fails", exc_info=True)
            file.end("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            file.end("finished", None)
        finally:
            self._progress_file = None

    def outcome(self, outcome: Outcome) -> None:
        """The tables of a finished run."""
        report = outcome.report
        rows = [(str(row["iteration"]), row) for row in report["iterations"]]
        rows = [*([outcome.start] if outcome.start is not None else []), *rows]
        self._iterations(f"iterations of {report['run']}", outcome.columns, rows, report["best_iteration"])
        if any(_cell(row, column) for _, row in rows for column in outcome.details):
            self._iterations(outcome.details_title, outcome.details, rows, report["best_iteration"])
        # Not as the table's caption: rich drops a letter where it wraps one.
        self.line(outcome.legend)
        if outcome.tests_table is not None:
            if outcome.tests_table.row_count:
                self.console.print(outcome.tests_table)
            return
        chosen, pairs = report.get("selection"), report.get("paired_tests")
        if chosen is not None and len(chosen["iterations"]) > 1:
            self.console.print(selection_table(chosen))
        if report["test"]:
            tests = narrow_table("test questions, in percent", "model", _SCORE_COLUMNS)
            for name in in_order(report["test"], outcome.tests):
                tests.add_row(name, *_score_cells(report["test"][name]))
            self.console.print(tests)
            if pairs:
                self.console.print(tests_table(pairs))
            self._coverage((report.get("data") or {}).get("coverage", {}).get("test"), "tests")
        if missing := _not_recorded(report):
            self.line(f"not recorded: {', '.join(missing)}")

    def _iterations(
        self, title: str, columns: Sequence[Column], rows: Sequence[tuple[str, Mapping[str, Any]]], best: int
    ) -> None:
        table = narrow_table(title, "iter", [column.name for column in columns])
        for name, row in rows:
            mark = " *" if row["iteration"] == best else ""
            table.add_row(name + mark, *(_cell(row, column) for column in columns))
        self.console.print(table)

    def _coverage(self, cover: Mapping[str, Any] | None, what: str) -> None:
        """What searching can gain at most, beside what was gained."""
        if cover is not None and cover["percent"] is not None:
            percent = f"{cover['percent']:.1f}%"
            self.line(f"evidence coverage: gold passages or answers of {percent} of the {what} are there")

    def scores(self, scores: Mapping[str, Any]) -> None:
        """The tables of `exsearch evaluate`: a row per set, the details of all together, the protocol's own scores."""
        if "models" in scores:
            self._model_scores(scores)
        else:
            table = narrow_table(f"{scores['predictions']}, in percent", "set", _GROUP_COLUMNS)
            table.add_row("all", *_group_cells(scores["all"]))
            self.console.print(table)
        for title, key in (("hops", "by_hops"), ("type", "by_type")):
            groups = narrow_table(f"by {title}", title, _GROUP_COLUMNS)
            for name, row in scores["all"][key].items():
                groups.add_row(escape(name), *_group_cells(row))
            if groups.row_count:
                self.console.print(groups)
        self._protocol_scores(scores["protocol"])
        if "models" in scores:
            self._trajectories(scores)
            self._coverage(scores["coverage"].get("all"), "questions")

    def _model_scores(self, scores: Mapping[str, Any]) -> None:
        title = f"{' and '.join(scores['models'].values())} on {scores['split']}, in percent"
        table = narrow_table(title, "set", _SCORE_COLUMNS)
        for name, row in scores["sets"].items():
            table.add_row(escape(name), *_score_cells(row))
        table.add_row("all", *_score_cells(scores["all"]))
        self.console.print(table)

    def _protocol_scores(self, found: Mapping[str, Any]) -> None:
        """What the data set's own script prints, where that is more than the other tables have."""
        if found["scores"].keys() <= METRICS.keys():
            return
        table = narrow_table(
            f"as {found['protocol']} scores them, in percent", "metric", ("n", "score", "95 %")
        )
        for name, score in found["scores"].items():
            table.add_row(name, str(found["counted"][name]), number(score), span(found["intervals"][name]))
        self.console.print(table)

    def _trajectories(self, scores: Mapping[str, Any]) -> None:
        stops = ", ".join(f"{name} {count}" for name, count in scores["all"]["stop_reasons"].items() if count)
        recall = ", ".join(number(value) for value in scores["all"]["gold_recall_by_step"])
        if not recall:
            searched = scores["all"]["searches"] > 0
            recall = "no gold passages named, or passages without ids" if searched else "no search was made"
        self.line(f"stop reasons: {stops}\ngold recall after each search: {recall}")


_GROUP_COLUMNS = ("n", "EM", "95 % of EM", "F1", "accuracy", "recall")
_SCORE_COLUMNS = (*_GROUP_COLUMNS, "searches")


def _not_recorded(report: Mapping[str, Any]) -> list[str]:
    """What an earlier version has not left behind, which made all of the run or a part of it."""
    is_missing = {
        "how sure the best iteration is": report["iterations"] and report.get("selection") is None,
        "pairs of tests": len(report["test"]) > 1 and not report.get("paired_tests"),
    }
    return [name for name, holds in is_missing.items() if holds]


def _cell(row: Mapping[str, Any], column: Column) -> str:
    if _is_null(row, column.path):
        return column.if_null
    value = number(_at(row, column.path), column.digits)
    error = number(_at(row, column.error_path), column.digits) if column.error_path else ""
    return f"{value} ± {error}" if value and error else value


def _is_null(row: Mapping[str, Any], path: str) -> bool:
    """True if the row has come as far as the path, and there is null."""
    *sections, name = path.split(".")
    for section in sections:
        row = row.get(section) or {}
    return name in row and row[name] is None


def _at(row: Mapping[str, Any], path: str) -> float | None:
    """The number at a path; None where the row has not come so far."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _score_cells(scores: Mapping[str, Any]) -> Sequence[str]:
    return (*_group_cells(scores), number(scores["searches"], 2))


def _group_cells(scores: Mapping[str, Any]) -> Sequence[str]:
    return (
        str(scores["n"]),
        number(scores["em"]),
        span(scores.get("em_interval")),
        number(scores["f1"]),
        number(scores["accuracy"]),
        number(scores["gold_recall"]),
    )
