"""Progress bars on a terminal; where none can be drawn, as in the log of a job, a line of each now and then."""

from __future__ import annotations

import threading
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task

EVERY_S = 60.0
"""Time between two lines of one bar, in seconds."""


class Bars(Progress):
    """Rich's bars, which say in lines what nobody would see of them.

    The field `unit` of a task names what it counts; None: it is only waited for.
    """

    def __init__(self, *columns: str | ProgressColumn, **options: Any) -> None:
        super().__init__(*columns, transient=True, **options)
        self.disable = not _can_draw(self.console)
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._say_now_and_then, name="progress in lines", daemon=True)

    def start(self) -> None:
        super().start()
        if self.disable:
            self._lines.start()

    def stop(self) -> None:
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        super().stop()

    def _say_now_and_then(self) -> None:
        while not self._ended.wait(EVERY_S):
            for task in self.tasks:
                self.console.print(in_words(task), highlight=False, markup=False, emoji=False, soft_wrap=True)


def _can_draw(console: Console) -> bool:
    """Whether what is drawn can be drawn over: on terminals that are not dumb, and in notebooks that have widgets."""
    if console.is_jupyter:
        return find_spec("ipywidgets") is not None
    return console.is_interactive


def in_words(task: Task) -> str:
    """How far it is, for how long it has gone on and about how long it will."""
    text = f"{task.description}: "
    if task.fields["unit"] is not None and task.total is not None:
        text += f"{task.completed:,.0f} of {task.total:,.0f} {task.fields['unit']}, "
    text += f"{timedelta(seconds=round(task.elapsed or 0.0))} so far"
    if (left := task.time_remaining) is not None and not task.finished:
        text += f", about {timedelta(seconds=round(left))} left"
    return text
