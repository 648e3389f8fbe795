"""The steps of a run: each is done once and recorded once, and some are begun and go on beside others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Self, TypeVar

from actors.background import Ongoing
from actors.timeline import Timeline
from pipeline.core.config import TrackingConfig
from pipeline.core.display import Display
from pipeline.core.report import scalars
from pipeline.core.run import PROFILE_FILE, Json, RunDirectory, write_json
from pipeline.core.tracking import Tracker

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Begun:
    """A step that was begun and goes on. It ends, and is recorded, with `finish`.

    Args:
        finish: waits for it, and gives its figures.
        cancel: ends it. What it has done stays where the next process finds it.
    """

    def __init__(self, finish: Callable[[], Json], cancel: Callable[[], None] = lambda: None) -> None:
        self._finish, self._cancel = finish, cancel
        self._is_over = False

    def finish(self) -> Json:
        self._is_over = True
        return self._finish()

    def cancel(self) -> None:
        """Nothing where it is finished."""
        if not self._is_over:
            self._is_over = True
            self._cancel()


def together(*begun: Begun) -> Begun:
    """Steps that go on beside each other as one: it has ended when all have, and its figures are the first one's."""

    def finish() -> Json:
        first, *_ = [step.finish() for step in begun]
        return first

    def cancel() -> None:
        for step in reversed(begun):
            step.cancel()

    return Begun(finish, cancel)


class Steps:
    """Those of one run directory. Use as a context manager: what still goes on at its end is cancelled.

    Args:
        files: the directory; a step that it says is finished is not done again.
        tracker: gets the figures of each step.
        display: shows what goes on.
        tracking: whether a timeline of one iteration is written.
    """

    def __init__(
        self, files: RunDirectory, tracker: Tracker, display: Display, tracking: TrackingConfig
    ) -> None:
        self.files, self.tracker, self.display = files, tracker, display
        self._timeline = Timeline() if tracking.profile else None
        """Until it is written."""
        self._begun: list[Begun] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for begun in reversed(self._begun):
            begun.cancel()

    def once(self, step: str, work: Callable[[], Json]) -> Json:
        """Do a step ("3/selector/train", "test/best") unless it is finished, and record its figures once."""
        if (finished := self.files.finished(step)) is not None:
            return finished
        self._begins(step)

        def recorded() -> Json:
            with self._timed(step):
                result = work()
            self._tell(step, result)
            return result

        return self.files.once(step, recorded)

    def begin(
        self,
        step: str,
        work: Callable[[], AbstractContextManager[Ongoing[T]]],
        result: Callable[[T], tuple[Json, float]],
    ) -> Begun:
        """Let a step go on from now, unless it is finished.

        Args:
            work: begins it; the context lasts until it has ended.
            result: of what comes of it: its figures, and how many seconds it took.
        """
        if (finished := self.files.finished(step)) is not None:
            return Begun(lambda: finished)
        self._begins(step)
        with ExitStack() as until_begun:
            until_begun.enter_context(self._timed(step))
            ongoing = until_begun.enter_context(work())
            until_ended = until_begun.pop_all()

        def finish() -> Json:
            asked = time.perf_counter()
            with until_ended:
                figures, seconds = result(ongoing.result())
            self._tell(step, figures)
            waited = round(time.perf_counter() - asked, 3)
            return self.files.record(step, {**figures, "seconds_waited": waited}, seconds)

        def cancel() -> None:
            ongoing.cancel()
            logger.info(f"{step} was begun, and is cancelled")
            until_ended.__exit__(CancelledError, CancelledError(), None)

        self._begun.append(Begun(finish, cancel))
        return self._begun[-1]

    def _begins(self, step: str) -> None:
        t, name = in_iteration(step)
        if t is not None:
            self.tracker.rollback(t, name)
        logger.info(f"{step} begins")

    def _tell(self, step: str, result: Json) -> None:
        """Before the step counts as finished: a kill in between has it repeated, and no figure is missing."""
        logger.info(f"{step}: {scalars(result)}")
        t, name = in_iteration(step)
        if t is not None:
            self.tracker.log(scalars(result), iteration=t, phase=name)

    def _timed(self, step: str) -> AbstractContextManager[None]:
        return self._timeline.step(step) if self._timeline is not None else nullcontext()

    def _write_timeline(self, t: int) -> None:
        """Once, if this process did a step of iteration t."""
        if self._timeline is None or not self._timeline.has(f"{t}/"):
            return
        path = self.files.at(PROFILE_FILE)
        write_json(path, self._timeline.trace())
        self.display.line(f"timeline of iteration {t}: {path}, for https://ui.perfetto.dev")
        self._timeline = None


def in_iteration(step: str) -> tuple[int | None, str]:
    """ "3/selector/train" is "selector/train" of iteration 3, "test/best" is of none."""
    head, _, name = step.partition("/")
    return (int(head), name) if head.isdecimal() else (None, step)
