"""What a person sees: progress, status lines and tables on the terminal; everything else goes to the run's log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
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
from rich.table import Table

from pipeline.core.progress import PROGRESS_FILE, ActorKind, Move, ProgressFile
from pipeline.core.report import SCORES, Column, Outcome

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
    def changing(self, description: str) -> Iterator[Callable[[str], None]]:
        """As `status`; what it gives shows further words behind the description."""
        with self._shown(description, None, None) as (bars, task):
            yield lambda words: bars.update(task, description=f"{description}: {words}")

    @contextmanager
    def _shown(
        self, description: str, total: int | None, unit: str | None, done: int = 0
    ) -> Iterator[tuple[Progress, TaskID]]:
        """A line among those of all that goes on: blocks may overlap in any order."""
        start = time.perf_counter()
        if self._bars is None:
            counted = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}"))
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                *(_Counted(column) for column in counted),
                TimeElapsedColumn(),
                _Counted(TimeRemainingColumn()),
                console=self.console,
                transient=True,
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
        self.line(f"{description}: {time.perf_counter() - start:.1f} s")

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
        names = [column.name for column in outcome.columns]
        table = _table(f"run {report['run']}: iterations", "iter", names)
        rows = [(str(row["iteration"]), row) for row in report["iterations"]]
        for name, row in [*([outcome.start] if outcome.start is not None else []), *rows]:
            mark = " *" if row["iteration"] == report["best_iteration"] else ""
            table.add_row(name + mark, *(_cell(row, column) for column in outcome.columns))
        self.console.print(table)
        # Not as the table's caption: rich drops a letter where it wraps one.
        self.line(outcome.legend)
        if report["test"]:
            tests = _table("test questions, in percent", "model", _SCORE_COLUMNS)
            for name, scores in _in_order(report["test"], outcome.tests):
                tests.add_row(name, *_score_cells(scores))
            self.console.print(tests)
            self._coverage((report.get("data") or {}).get("coverage", {}).get("test"), "tests")

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
            table = _table(f"{scores['predictions']}, in percent", "set", _GROUP_COLUMNS)
            table.add_row("all", *_group_cells(scores["all"]))
            self.console.print(table)
        for title, key in (("hops", "by_hops"), ("type", "by_type")):
            groups = _table(f"by {title}", title, _GROUP_COLUMNS)
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
        table = _table(title, "set", _SCORE_COLUMNS)
        for name, row in scores["sets"].items():
            table.add_row(escape(name), *_score_cells(row))
        table.add_row("all", *_score_cells(scores["all"]))
        self.console.print(table)

    def _protocol_scores(self, found: Mapping[str, Any]) -> None:
        """What the data set's own script prints, where that is more than the other tables have."""
        if found["scores"].keys() <= set(SCORES):
            return
        table = _table(f"as {found['protocol']} scores them, in percent", "metric", ("n", "score", "95 %"))
        for name, score in found["scores"].items():
            table.add_row(name, str(found["counted"][name]), _number(score), _range(found["intervals"][name]))
        self.console.print(table)

    def _trajectories(self, scores: Mapping[str, Any]) -> None:
        stops = ", ".join(f"{name} {count}" for name, count in scores["all"]["stop_reasons"].items() if count)
        recall = ", ".join(_number(value) for value in scores["all"]["gold_recall_by_step"])
        if not recall:
            searched = scores["all"]["searches"] > 0
            recall = "no gold passages named, or passages without ids" if searched else "no search was made"
        self.line(f"stop reasons: {stops}\ngold recall after each search: {recall}")


_GROUP_COLUMNS = ("n", "EM", "95 % of EM", "F1", "accuracy", "recall")
_SCORE_COLUMNS = (*_GROUP_COLUMNS, "searches")


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=7)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _in_order(tests: Mapping[str, Any], order: Sequence[str]) -> list[tuple[str, Any]]:
    return sorted(tests.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _cell(row: Mapping[str, Any], column: Column) -> str:
    if _is_null(row, column.path):
        return column.if_null
    value = _number(_at(row, column.path), column.digits)
    error = _number(_at(row, column.error_path), column.digits) if column.error_path else ""
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
    return (*_group_cells(scores), _number(scores["searches"], 2))


def _group_cells(scores: Mapping[str, Any]) -> Sequence[str]:
    return (
        str(scores["n"]),
        _number(scores["em"]),
        _range(scores.get("em_interval")),
        _number(scores["f1"]),
        _number(scores["accuracy"]),
        _number(scores["gold_recall"]),
    )


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.1f}-{interval[1]:.1f}"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
