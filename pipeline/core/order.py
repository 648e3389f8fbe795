"""In which order the tasks of a phase are begun. What comes of a task does not depend on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.core.agents.program import Task

TIMES_IN_FLIGHT = 4
"""So many times as many tasks as are in flight are put in order. The longest take that many times as long as the mean,
or longer."""


def longest_first(tasks: Sequence[Task], lengths: Mapping[str, float], last: int) -> list[Task]:
    """The last so many tasks in the order of their expected lengths; those before as they are.

    A phase ends with its longest episodes, alone on engines that could do many: so these should not be begun last. Only
    the end is put in order, because a shard is held in memory from its first task to its last.

    Args:
        lengths: by the id of a task, in any unit. Tasks without one come first, as they are.
    """
    begin = max(0, len(tasks) - last)
    return [*tasks[:begin], *sorted(tasks[begin:], key=lambda task: -lengths.get(task.id, float("inf")))]
