"""The order of an iteration's steps, and which of them go on beside each other."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pipeline.core.config import Iterations
from pipeline.core.report import EVALUATION, should_stop
from pipeline.run import Run
from pipeline.steps import Begun

logger = logging.getLogger(__name__)


def iterate(
    run: Run,
    settings: Iterations,
    evaluate: Callable[[int], Begun],
    sample: Callable[[int, int], Begun],
    train: Callable[[int], object],
    report: Callable[[], object] | None = None,
) -> None:
    """Iterations 1, 2, ..., until all are done or `settings.patience` is at its end.

    Version t is evaluated beside the sampling for iteration t + 1, which needs the same weights. With
    `settings.asynchronous` that sampling is the one for t + 2, and both go on beside the training of t + 1: nobody
    waits, and the scores that may end the iterations come one training later.

    Args:
        evaluate: begins to score version t on the dev questions.
        sample: begins the sampling for iteration t from version v, given t and v.
        train: makes version t.
        report: writes the report so far; None: that of `Run.report`.
    """
    _Iterations(run, settings, evaluate, sample, train, report or (lambda: run.report(settings))).to_the_end()


class _Iterations:
    def __init__(
        self,
        run: Run,
        settings: Iterations,
        evaluate: Callable[[int], Begun],
        sample: Callable[[int, int], Begun],
        train: Callable[[int], object],
        report: Callable[[], object],
    ) -> None:
        self.run, self.settings = run, settings
        self.evaluate, self.sample, self.train, self.report = evaluate, sample, train, report

    def to_the_end(self) -> None:
        if self.settings.asynchronous:
            self._one_behind(self.settings.iterations)
        else:
            self._in_step(self.settings.iterations)

    def _in_step(self, last: int) -> None:
        for t in range(1, last + 1):
            if self._is_over(t - 1):
                return
            scored = self.evaluate(t - 1)
            sampled = self.sample(t, t - 1)
            if self._ends_with(t - 1, scored):
                sampled.cancel()
                return
            sampled.finish()
            self.train(t)
        self._ends_with(last, self.evaluate(last))

    def _one_behind(self, last: int) -> None:
        sampled = self.sample(1, 0) if last else None
        for t in range(1, last + 1):
            assert sampled is not None
            sampled.finish()
            if self._is_over(t - 1):
                return
            scored = self.evaluate(t - 1)
            sampled = self.sample(t + 1, t - 1) if t < last else None
            self.train(t)
            if self._ends_with(t - 1, scored):
                if sampled is not None:
                    sampled.cancel()
                return
        self._ends_with(last, self.evaluate(last))

    def _ends_with(self, t: int, scored: Begun) -> bool:
        """The end of iteration t with its scores; True if it was the last one."""
        scored.finish()
        if t == 0:
            return False
        self.run.end_iteration(t, self.settings)
        self.report()
        if over := self._is_over(t):
            logger.info(
                f"stopped early: no better dev {self.settings.select_by} for {self.settings.patience}"
            )
        return over

    def _is_over(self, t: int) -> bool:
        """Whether the scores of iteration t are known, and it was the last one."""
        files = self.run.files
        return files.finished(f"{t}/{EVALUATION}") is not None and should_stop(files, t, self.settings)
