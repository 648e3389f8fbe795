"""The shards of one phase of sampling: what is complete stays, whatever ends the process.

A shard holds so many tasks, in the order of the tasks, so that what is in it does not depend on when they finish. Its
files, in the order in which they are written:

    POLICY/examples/000000.parquet    for each policy that gets examples
    rollouts/000000.parquet
    rollouts/_000000.json             the side-car: which tasks these are, what was counted in each, its statistics;
                                      size and checksum of the other files

A shard is complete exactly when all of them are there as they were written, and the side-car is of the tasks that
belong there now.

Where more tasks are in flight than a shard has, many are done long before the last one of their shard is. They are
written too, a shard's number of them together, and removed when their shards are complete:

    rollouts/_loose/000000/POLICY.parquet, rollouts.parquet, tasks.json
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.core.agents.program import Task
from pipeline.core.record_tables import (
    examples_from_table,
    examples_to_table,
    trajectories_from_table,
    trajectories_to_table,
)
from pipeline.core.records import Episode, Example, Trajectory
from pipeline.core.run import write_json, write_records
from pipeline.core.weighing import Weighted
from retriever_service import files
from retriever_service.errors import RetrieverError

logger = logging.getLogger(__name__)

_MEND = "this shard is made again"

Done = tuple[Sequence[Episode], Weighted]
"""What became of one task."""


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
            generated_tokens=sum(int(turn.sampled.sum()) for e in episodes for turn in e.turns),
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


_COUNTED = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True, slots=True)
class _Files:
    """Of tasks that are written together: the trajectories, the examples by whom they train, the side-car."""

    rollouts: Path
    examples: Mapping[str, Path]
    side_car: Path

    def tables(self) -> dict[str, Path]:
        """By the name that the side-car has for each."""
        return {"rollouts": self.rollouts, **{f"{name}/examples": at for name, at in self.examples.items()}}

    def all(self) -> list[Path]:
        return [*self.tables().values(), self.side_car]


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
        self.loose: dict[str, Counts] = {}
        """By its id each task that is written and not in one of these, as `resume` found them."""
        self._loose_sets: dict[int, set[str]] = {}

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
        """The tasks that are not written."""
        open_shards = (shard for shard in range(len(self)) if shard not in self.complete)
        return [task for shard in open_shards for task in self.members(shard) if task.id not in self.loose]

    def counts(self) -> Counts:
        """Of the tasks that are written."""
        of_shards = (self.complete[shard] for shard in sorted(self.complete))
        return sum(itertools.chain(of_shards, self.loose.values()), Counts())

    # ---------------------------------------------------------------- on disk

    def resume(self, max_failure_share: float = 1.0) -> None:
        """Find out which tasks are written (`complete`, `loose`), and remove whatever else lies in the directories.

        Where a larger share of the episodes in them failed for infrastructure reasons, those with failures are made
        again as well: it was their failures that ended the phase, and the same command is to have another chance.
        """
        for directory in self._directories():
            directory.mkdir(parents=True, exist_ok=True)
        self.complete = {n: counts for n in range(len(self)) if (counts := self._read_shard(n)) is not None}
        self._find_loose()
        if (all_of_them := self.counts()).exceed(max_failure_share):
            failed = [n for n, counts in self.complete.items() if counts.infrastructure_failures]
            again = {task.id for shard in failed for task in self.members(shard)}
            again |= {task_id for task_id, counts in self.loose.items() if counts.infrastructure_failures}
            loose = self._drop_loose(again)
            logger.warning(
                f"{self.rollouts}: too many trajectories failed for reasons outside of the model; {len(failed)} shards "
                f"and {loose} tasks of others are made again; last: {all_of_them.last_failure}"
            )
            for shard in failed:
                del self.complete[shard]
        self.remove_loose(self.loose)
        self._remove_the_rest()
        if self.complete or self.loose:
            done = len(self.tasks) - len(self.to_do())
            logger.info(
                f"{self.rollouts}: {len(self.complete)} of {len(self)} shards are complete, {done} of "
                f"{len(self.tasks)} tasks are not sampled again"
            )

    def write(self, shard: int, done: Sequence[Done]) -> None:
        """Write a shard; `done` has all of its tasks, in their order."""
        _write(self._files(shard), self.members(shard), done)

    def write_loose(self, done: Mapping[str, Done]) -> None:
        """Write tasks whose shards are not complete, by their id."""
        number = max(self._loose_sets, default=-1) + 1
        tasks = [self.tasks[self._index[task_id]] for task_id in done]
        _write(self._loose_files(number), tasks, list(done.values()))
        self._loose_sets[number] = set(done)

    def read_loose(self) -> dict[str, Done]:
        """What became of the tasks in `loose`; episodes without their `scores`."""
        found: dict[str, Done] = {}
        for number in sorted(self._loose_sets):
            at = self._loose_files(number)
            turns = iter(trajectories_from_table(pq.read_table(at.rollouts)))
            examples = {
                name: iter(examples_from_table(pq.read_table(path))) for name, path in at.examples.items()
            }
            for row in _rows(at.side_car):
                episodes = _episodes(itertools.islice(turns, row["turns"]))
                own = {name: list(itertools.islice(examples[name], n)) for name, n in row["examples"].items()}
                found[row["id"]] = (episodes, Weighted(own, row["statistics"]))
        return {task_id: done for task_id, done in found.items() if task_id in self.loose}

    def remove_loose(self, needed: Container[str]) -> None:
        """Remove what was written of tasks together none of which is needed any more."""
        for number, members in list(self._loose_sets.items()):
            if not any(member in needed for member in members):
                at = self._loose_files(number)
                at.side_car.unlink()  # first: without it nothing of the others counts
                shutil.rmtree(at.side_car.parent)
                del self._loose_sets[number]
        if self._loose.exists() and not self._loose_sets:
            shutil.rmtree(self._loose)

    def statistics(self) -> list[Mapping[str, Any]]:
        """Of every task, in the order of the tasks; all shards are complete."""
        return [row["statistics"] for shard in range(len(self)) for row in _rows(self._files(shard).side_car)]

    def episodes(self) -> list[Episode]:
        """Of every task, in the order of the tasks, without their `scores`; all shards are complete."""
        return _episodes(
            turn
            for shard in range(len(self))
            for turn in trajectories_from_table(pq.read_table(self._files(shard).rollouts))
        )

    # ---------------------------------------------------------------- inside

    def _directories(self) -> list[Path]:
        return [self.rollouts, *self.examples.values()]

    def _files(self, shard: int) -> _Files:
        name = f"{shard:06d}.parquet"
        examples = {output: directory / name for output, directory in self.examples.items()}
        return _Files(self.rollouts / name, examples, side_car_of(self.rollouts / name))

    @property
    def _loose(self) -> Path:
        return self.rollouts / "_loose"

    def _loose_files(self, number: int) -> _Files:
        at = self._loose / f"{number:06d}"
        examples = {output: at / f"{output}.parquet" for output in self.examples}
        return _Files(at / "rollouts.parquet", examples, at / "tasks.json")

    def _read_shard(self, shard: int) -> Counts | None:
        """What was counted in a complete shard; None, and a word in the log, if it is not complete."""
        found = self._read(self._files(shard), [task.id for task in self.members(shard)])
        return None if found is None else sum(found.values(), Counts())

    def _read(self, at: _Files, expected: Sequence[str] | None = None) -> dict[str, Counts] | None:
        """What was counted of each task; None, and a word in the log, if not all is there as it was written.

        Args:
            expected: the ids that belong there, if that is known.
        """
        if not at.side_car.exists():
            return None
        with _told_of(at.side_car):
            rows = _rows(at.side_car)
            counts = {row["id"]: Counts(**{key: row[key] for key in _COUNTED}) for row in rows}
            are_known = all(
                self._name_of(row["id"]) == {key: row[key] for key in ("id", "digest")} for row in rows
            )
            if not are_known or (expected is not None and list(counts) != list(expected)):
                raise RetrieverError(f"{at.side_car} is of other tasks; {_MEND}")
            _check_contents(at.tables(), _read_json(at.side_car)["files"])
            return counts
        return None

    def _find_loose(self) -> None:
        numbers = sorted(int(path.name) for path in self._loose.glob("*") if path.name.isdecimal())
        found = {n: counts for n in numbers if (counts := self._read(self._loose_files(n)))}
        self._loose_sets = {number: set(counts) for number, counts in found.items()}
        self.loose = {
            task_id: counts
            for of_set in found.values()
            for task_id, counts in of_set.items()
            if self._index[task_id] // self.tasks_per_shard not in self.complete
        }

    def _drop_loose(self, again: set[str]) -> int:
        """Drop these tasks, and those in sets with them: a set counts as a whole, and would bring them back."""
        while sets := [number for number, members in self._loose_sets.items() if members & again]:
            for number in sets:
                again |= self._loose_sets.pop(number)
        dropped = again & self.loose.keys()
        for task_id in dropped:
            del self.loose[task_id]
        return len(dropped)

    def _name_of(self, task_id: str) -> dict[str, str] | None:
        index = self._index.get(task_id)
        return None if index is None else _name(self.tasks[index])

    def _remove_the_rest(self) -> None:
        whole = {path for shard in self.complete for path in self._files(shard).all()}
        if self._loose_sets:
            whole |= {
                self._loose,
                *(self._loose_files(number).side_car.parent for number in self._loose_sets),
            }
        directories = [*self._directories(), *([self._loose] if self._loose_sets else [])]
        rest = [path for directory in directories for path in directory.iterdir() if path not in whole]
        # Side-cars first, and for good: without its own none of the other files counts.
        for path in sorted(rest, key=lambda path: path.suffix != ".json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        files.fsync(self.rollouts)


def generated_tokens(rollouts: Path) -> dict[str, float]:
    """How much was generated for each task of a phase, by its id, as far as its side-cars say."""
    found: dict[str, float] = {}
    for side_car in side_cars(rollouts):
        with _told_of(side_car, "it says nothing of how long questions take"):
            found |= {row["id"]: float(row["generated_tokens"]) for row in _rows(side_car)}
    return found


def statistics_by_task(rollouts: Path) -> dict[str, Mapping[str, Any]]:
    """What the weighting of a phase says of each task, by its id, in their order, as far as its side-cars say."""
    found: dict[str, Mapping[str, Any]] = {}
    for side_car in side_cars(rollouts):
        with _told_of(side_car, "its tasks are left out of figures by question"):
            found |= {row["id"]: row["statistics"] for row in _rows(side_car)}
    return found


def side_cars(rollouts: Path) -> list[Path]:
    """Of the shards of a phase, in their order."""
    return sorted(rollouts.glob("_*.json"))


def write_examples(shard: Path, examples: Iterable[Example]) -> None:
    """Write a shard of examples that no sampling made, and its side-car."""
    write_records(shard, examples_to_table(examples))
    write_json(side_car_of(shard), files.records_as_json({shard.name: files.record_file(shard)}))


def has_examples(shard: Path) -> bool:
    """Whether what `write_examples` wrote is there unchanged; if not, the log says why."""
    with _told_of(side_car_of(shard)):
        _check_contents({shard.name: shard}, _read_json(side_car_of(shard)))
        return True
    return False


@contextmanager
def _told_of(side_car: Path, consequence: str = _MEND) -> Iterator[None]:
    """Whatever shows that files are not there as they were written is told in the log, and goes no further."""
    try:
        yield
    except RetrieverError as error:
        logger.warning(str(error))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            f"{side_car} cannot be read, or is of an earlier version ({error!r:.200}); {consequence}"
        )


def _check_contents(tables: Mapping[str, Path], recorded: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises:
        RetrieverError: one is not as it was written.
    """
    records = files.records_from_json(recorded)
    for name, path in tables.items():
        files.check_contents(path, records[name], _MEND)


def side_car_of(shard: Path) -> Path:
    """Readers of Parquet directories pass over names that begin with an underscore."""
    return shard.with_name(f"_{shard.stem}.json")


def written_parts(rollouts: Path) -> dict[str, tuple[Path, Path]]:
    """By its name each file of trajectories that is whole, a shard or tasks whose shards are not complete, and its
    side-car. What is not in a shard yet may be in one soon, and not there any more."""
    shards = {path.stem: (path, side_car_of(path)) for path in sorted(rollouts.glob("*.parquet"))}
    loose = {
        f"loose-{folder.name}": (folder / "rollouts.parquet", folder / "tasks.json")
        for folder in sorted((rollouts / "_loose").glob("*"))
    }
    return {name: files for name, files in (shards | loose).items() if files[1].exists()}


def _write(at: _Files, tasks: Sequence[Task], done: Sequence[Done]) -> None:
    for output, path in at.examples.items():
        examples = (example for _, weighted in done for example in weighted.examples[output])
        write_records(path, examples_to_table(examples))
    turns = (turn for episodes, _ in done for episode in episodes for turn in episode.turns)
    write_records(at.rollouts, trajectories_to_table(turns))
    rows = [
        _name(task)
        | asdict(Counts.of(episodes))
        | {"turns": sum(len(episode.turns) for episode in episodes)}
        | {"examples": {output: len(weighted.examples[output]) for output in at.examples}}
        | {"statistics": dict(weighted.statistics)}
        for task, (episodes, weighted) in zip(tasks, done, strict=True)
    ]
    records = {name: files.record_file(path) for name, path in at.tables().items()}
    write_json(at.side_car, {"files": files.records_as_json(records), "tasks": rows})


def _rows(side_car: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _read_json(side_car)["tasks"]
    return found


def _read_json(side_car: Path) -> dict[str, Any]:
    return files.json_object(side_car.read_bytes())


def _episodes(turns: Iterable[Trajectory]) -> list[Episode]:
    by_episode = itertools.groupby(turns, key=lambda turn: (turn.question_id, turn.sample))
    return [Episode(task_id, sample, tuple(own)) for (task_id, sample), own in by_episode]


def _name(task: Task) -> dict[str, str]:
    """By which a task is known again: its id, and a digest of all that it says of itself."""
    digest = hashlib.blake2b(repr(task).encode(), digest_size=8).hexdigest()
    return {"id": task.id, "digest": digest}
