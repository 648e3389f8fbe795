"""The weighting actor: a question's K trajectories in, K weighted examples out.

It works while rollouts go on, and does arithmetic only: what the engines had to score came with the episodes. Shards
are written as soon as all their tasks are in, the statistics of their tasks in a file beside them. What is in a shard
depends only on the tasks, never on the order in which they finish.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pipeline.core.agents.program import Task
from pipeline.core.records import Episode, examples_to_table, trajectories_to_table
from pipeline.core.run import write_json, write_table
from pipeline.core.weighing import Weigh, Weighted


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the episodes of a phase and the examples made of them go.

    Attributes:
        rollouts: empty directory for the shards of trajectories and their statistics.
        examples: an empty directory per output of `weigh`.
        tasks_per_shard: a shard holds so many tasks, in the order of the tasks.
        weigh: what makes examples of a task's episodes.
    """

    rollouts: Path
    examples: dict[str, Path]
    tasks_per_shard: int
    weigh: Weigh[Any]


class Weighting:
    """The actor class."""

    async def begin(self, tasks: Sequence[Task], destination: Destination) -> None:
        """Start a phase over `tasks`.

        Raises:
            ValueError: the directories are not those of the outputs.
        """
        if set(destination.examples) != set(destination.weigh.outputs):
            raise ValueError(f"{list(destination.examples)} are not {list(destination.weigh.outputs)}")
        self._tasks = list(tasks)
        self._order = {task.id: index for index, task in enumerate(tasks)}
        self._to = destination
        self._waiting: dict[int, tuple[Sequence[Episode], Weighted]] = {}
        self._done = 0

    async def add(self, episodes: Sequence[Episode]) -> None:
        """One task's episodes. Either all of it is kept or, on failure, nothing."""
        index = self._order[episodes[0].task_id]
        self._waiting[index] = (episodes, self._to.weigh(self._tasks[index], episodes))
        self._write_shard_if_complete(index // self._to.tasks_per_shard)

    async def finish(self) -> dict[str, Any]:
        """What `weigh` says of the whole phase.

        Raises:
            RuntimeError: tasks are missing, or nothing can be trained on.
        """
        missing = len(self._tasks) - self._done
        if missing:
            raise RuntimeError(
                f"the phase is not complete: {missing} of {len(self._tasks)} tasks are missing"
            )
        rows = [
            row
            for path in sorted(self._to.rollouts.glob("_*.json"))
            for row in json.loads(path.read_text(encoding="utf-8"))["tasks"]
        ]
        return dict(self._to.weigh.summarise(rows))

    def _write_shard_if_complete(self, shard: int) -> None:
        first = shard * self._to.tasks_per_shard
        members = range(first, min(first + self._to.tasks_per_shard, len(self._tasks)))
        if not all(index in self._waiting for index in members):
            return
        done = [self._waiting.pop(index) for index in members]
        name = f"{shard:06d}.parquet"
        for output, directory in self._to.examples.items():
            examples = (e for _, weighted in done for e in weighted.examples[output])
            write_table(directory / name, examples_to_table(examples))
        turns = (turn for episodes, _ in done for episode in episodes for turn in episode.turns)
        write_table(self._to.rollouts / name, trajectories_to_table(turns))
        statistics = {"tasks": [dict(weighted.statistics) for _, weighted in done]}
        # Readers of Parquet directories pass over names that begin with an underscore.
        write_json(self._to.rollouts / f"_{shard:06d}.json", statistics)
        self._done += len(done)


WeightingActor = ray.remote(Weighting)
