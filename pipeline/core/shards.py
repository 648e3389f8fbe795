"""The shards of one phase of sampling: what is complete stays, whatever ends the process.

A shard holds so many tasks, in the order of the tasks, so that what is in it does not depend on when they finish. Its
files, in the order in which they are written:

    POLICY/examples/000000.parquet    for each policy that gets examples
    rollouts/000000.parquet
    rollouts/_000000.json             the side-car: which tasks these are, what was counted in each, its statistics;
                                      size and checksum of the other files

A shard is complete exactly when all of them are there as they were written, and the side-car is of the tasks that
belong there now.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.core.agents.program import Task
from pipeline.core.records import Episode, examples_to_table, trajectories_from_table, trajectories_to_table
from pipeline.core.run import write_json, write_table
from pipeline.core.weighing import Weighted
from retriever_service import files
from retriever_service.errors import RetrieverError

logger = logging.getLogger(__name__)

_MEND = "this shard is made again"


@dataclass(frozen=True, slots=True)
class Counts:
    """What is counted of episodes: those of a task, of a shard, of a phase."""

    episodes: int = 0
    generated_tokens: int = 0
    infrastructure_failures: int = 0
    last_failure: str = ""
    """What the last of these said."""

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Counts:
        failures = [failure for episode in episodes if (failure := episode.failure) is not None]
        return cls(
            episodes=len(episodes),
            generated_tokens=sum(int(turn.loss_mask.sum()) for e in episodes for turn in e.turns),
            infrastructure_failures=len(failures),
            last_failure=failures[-1].detail if failures else "",
        )

    def __add__(self, later: Counts) -> Counts:
        return Counts(
            self.episodes + later.episodes,
            self.generated_tokens + later.generated_tokens,
            self.infrastructure_failures + later.infrastructure_failures,
            later.last_failure or self.last_failure,
        )

    def __sub__(self, lost: Counts) -> Counts:
        return Counts(
            self.episodes - lost.episodes,
            self.generated_tokens - lost.generated_tokens,
            self.infrastructure_failures - lost.infrastructure_failures,
            self.last_failure,
        )

    def exceed(self, max_failure_share: float) -> bool:
        """Whether a larger share of the episodes failed for infrastructure reasons."""
        return self.infrastructure_failures > max_failure_share * self.episodes


class Shards:
    """Those of one phase. It can be pickled: the weighting actor writes what the driver resumes.

    Args:
        tasks: of the phase, in their order.
        rollouts: directory of the trajectories and the side-cars.
        examples: directory of the training examples, by the name of whom they train.
        tasks_per_shard: the last shard may have fewer.
    """

    def __init__(
        self, tasks: Sequence[Task], rollouts: Path, examples: Mapping[str, Path], tasks_per_shard: int
    ) -> None:
        self.tasks, self.rollouts, self.examples = list(tasks), rollouts, dict(examples)
        self.tasks_per_shard = tasks_per_shard
        self.complete: dict[int, Counts] = {}
        """The complete shards, as `resume` found them."""

    # ---------------------------------------------------------------- what belongs where

    def __len__(self) -> int:
        return math.ceil(len(self.tasks) / self.tasks_per_shard)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {task.id: index for index, task in enumerate(self.tasks)}

    def shard_of(self, task: Task) -> int:
        return self._index[task.id] // self.tasks_per_shard

    def members(self, shard: int) -> Sequence[Task]:
        first = shard * self.tasks_per_shard
        return self.tasks[first : first + self.tasks_per_shard]

    def to_do(self) -> list[Task]:
        """The tasks of the shards that are not complete."""
        return [
            task for shard in range(len(self)) if shard not in self.complete for task in self.members(shard)
        ]

    def counts(self) -> Counts:
        """Of the complete shards."""
        return sum((self.complete[shard] for shard in sorted(self.complete)), Counts())

    # ---------------------------------------------------------------- on disk

    def resume(self, max_failure_share: float = 1.0) -> None:
        """Find out which shards are complete (`complete`), and remove whatever else lies in the directories.

        Where a larger share of the episodes in them failed for infrastructure reasons, those with failures are made
        again as well: it was their failures that ended the phase, and the same command is to have another chance.
        """
        for directory in self._directories():
            directory.mkdir(parents=True, exist_ok=True)
        self.complete = {n: counts for n in range(len(self)) if (counts := self._read_counts(n)) is not None}
        if (all_of_them := self.counts()).exceed(max_failure_share):
            failed = [n for n, counts in self.complete.items() if counts.infrastructure_failures]
            logger.warning(
                f"{self.rollouts}: too many trajectories failed for reasons outside of the model; {len(failed)} shards "
                f"with failures are made again; last: {all_of_them.last_failure}"
            )
            for shard in failed:
                del self.complete[shard]
        self._remove_the_rest()
        if self.complete:
            done = len(self.tasks) - len(self.to_do())
            logger.info(
                f"{self.rollouts}: {len(self.complete)} of {len(self)} shards are complete, {done} of "
                f"{len(self.tasks)} tasks are not sampled again"
            )

    def write(self, shard: int, done: Sequence[tuple[Sequence[Episode], Weighted]]) -> None:
        """Write a shard; `done` has all of its tasks, in their order."""
        name = f"{shard:06d}.parquet"
        for output, directory in self.examples.items():
            examples = (example for _, weighted in done for example in weighted.examples[output])
            write_table(directory / name, examples_to_table(examples))
        turns = (turn for episodes, _ in done for episode in episodes for turn in episode.turns)
        write_table(self.rollouts / name, trajectories_to_table(turns))
        rows = [
            _name(task) | asdict(Counts.of(episodes)) | {"statistics": dict(weighted.statistics)}
            for task, (episodes, weighted) in zip(self.members(shard), done, strict=True)
        ]
        records = {name: files.record_file(path) for name, path in self._tables(shard).items()}
        write_json(self._side_car(shard), {"files": files.records_as_json(records), "tasks": rows})

    def statistics(self) -> list[Mapping[str, Any]]:
        """Of every task, in the order of the tasks; all shards are complete."""
        return [
            row["statistics"] for shard in range(len(self)) for row in self._read_side_car(shard)["tasks"]
        ]

    def episodes(self) -> list[Episode]:
        """Of every task, in the order of the tasks, without their `scores`; all shards are complete."""
        turns = (
            turn
            for shard in range(len(self))
            for turn in trajectories_from_table(pq.read_table(self.rollouts / f"{shard:06d}.parquet"))
        )
        by_episode = itertools.groupby(turns, key=lambda turn: (turn.question_id, turn.sample))
        return [Episode(task_id, sample, tuple(own)) for (task_id, sample), own in by_episode]

    # ---------------------------------------------------------------- inside

    def _directories(self) -> list[Path]:
        return [self.rollouts, *self.examples.values()]

    def _side_car(self, shard: int) -> Path:
        # Readers of Parquet directories pass over names that begin with an underscore.
        return self.rollouts / f"_{shard:06d}.json"

    def _tables(self, shard: int) -> dict[str, Path]:
        """The Parquet files of a shard, by the name that the side-car has for each."""
        directories = {"rollouts": self.rollouts, **{f"{n}/examples": at for n, at in self.examples.items()}}
        return {name: directory / f"{shard:06d}.parquet" for name, directory in directories.items()}

    def _files(self, shard: int) -> list[Path]:
        return [*self._tables(shard).values(), self._side_car(shard)]

    def _read_side_car(self, shard: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._side_car(shard).read_text(encoding="utf-8"))
        return found

    def _read_counts(self, shard: int) -> Counts | None:
        """What was counted in a complete shard; None, and a word in the log, if it is not complete."""
        side_car = self._side_car(shard)
        if not side_car.exists():
            return None
        try:
            found = self._read_side_car(shard)
            rows, records = found["tasks"], files.records_from_json(found["files"])
            names = [{key: row[key] for key in ("id", "digest")} for row in rows]
            counts = [Counts(**{key: row[key] for key in asdict(Counts())}) for row in rows]
            if names != [_name(task) for task in self.members(shard)]:
                raise RetrieverError(f"{side_car} is of other tasks; {_MEND}")
            for name, path in self._tables(shard).items():
                files.check_contents(path, records[name], _MEND)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(f"{side_car} cannot be read, or is of an earlier version ({error!r}); {_MEND}")
        except RetrieverError as error:
            logger.warning(str(error))
        else:
            return sum(counts, Counts())
        return None

    def _remove_the_rest(self) -> None:
        whole = {path for shard in self.complete for path in self._files(shard)}
        rest = [
            path for directory in self._directories() for path in directory.iterdir() if path not in whole
        ]
        # Side-cars first, and for good: without its own none of the other files counts.
        for path in sorted(rest, key=lambda path: path.suffix != ".json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        files.fsync(self.rollouts)


def _name(task: Task) -> dict[str, str]:
    """By which a task is known again: its id, and a digest of all that it says of itself."""
    digest = hashlib.blake2b(repr(task).encode(), digest_size=8).hexdigest()
    return {"id": task.id, "digest": digest}
