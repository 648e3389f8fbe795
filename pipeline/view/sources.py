"""Which trajectories a run has, phase by phase; also of a phase that goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pipeline.core.data.split_names import Split
from pipeline.core.run import Json, RunFiles
from pipeline.core.shards import written_parts
from pipeline.view.stored import NoSuchPage, Questions, num_rows, questions_in, tasks_in

Kind = Literal["samples", "dev samples", "dev", "test"]
_FOLDERS: dict[str, tuple[Kind, str]] = {
    "rollouts": ("samples", "sample.json"),
    "evaluation": ("dev", "evaluation.json"),
    "dev_samples": ("dev samples", "dev_bound.json"),
}
"""Of an iteration: what is in each, and the file of the step that makes it."""
_KEY = re.compile(rf"(\d{{4,}})-({'|'.join(_FOLDERS)})|test-([^/]+)")


@dataclass(frozen=True, slots=True)
class Part:
    """A Parquet file of trajectories, by its name in the source. `side_car` is None of evaluations."""

    name: str
    path: Path
    side_car: Path | None = None

    def num_rows(self) -> int:
        """
        Raises:
            NoSuchPage, UserError: the file is not there any more, or damaged.
        """
        return num_rows(self.path)

    def questions(self) -> Questions:
        """
        Raises:
            NoSuchPage, UserError: the file is not there any more, or damaged.
        """
        return questions_in(self.path)

    def tasks(self) -> dict[str, Json]:
        """By question what the side-car says; empty without one.

        Raises:
            UserError: it is damaged.
        """
        return {} if self.side_car is None else tasks_in(self.side_car)

    def examples(self) -> dict[str, Path]:
        """By policy, the files of the training examples that were made of it."""
        folder = self.path.parent
        if self.side_car is not None and self.side_car.parent.parent.name == "_loose":
            return {path.stem: path for path in folder.glob("*.parquet") if path != self.path}
        return {path.parts[-3]: path for path in folder.parent.glob(f"*/examples/{self.path.name}")}


@dataclass(frozen=True, slots=True)
class Source:
    """The trajectories of one phase.

    Attributes:
        key: in the names of pages: "0001-rollouts", "test-best".
        iteration: None of a test.
        parts: in the order of the questions, but for those of questions whose shards are not complete.
        finished: no further part will come.
    """

    key: str
    kind: Kind
    iteration: int | None
    parts: tuple[Part, ...]
    finished: bool

    @property
    def split(self) -> Split:
        """Of its questions."""
        return "train" if self.kind == "samples" else "test" if self.kind == "test" else "dev"

    @property
    def name(self) -> str:
        """Of a test; else of the kind."""
        return self.key.removeprefix("test-") if self.kind == "test" else self.kind

    def part(self, name: str) -> Part:
        """
        Raises:
            NoSuchPage: it has none of that name.
        """
        for part in self.parts:
            if part.name == name:
                return part
        raise NoSuchPage(f"{self.key} has no part {name} (any more)")


def sources_of(run: RunFiles) -> list[Source]:
    """In the order in which they were made; those without a complete part are left out."""
    iterations = sorted(path.name for path in run.path.glob("iterations/[0-9]*"))
    tests = {path.stem: path.stat().st_mtime for path in (run.path / "test").glob("*.p*")}
    keys = [f"{number}-{folder}" for number in iterations for folder in _FOLDERS]
    keys += [f"test-{name}" for name in sorted(tests, key=lambda name: tests[name])]
    return [source for key in keys if (source := source_of(run, key)).parts]


def source_of(run: RunFiles, key: str) -> Source:
    """
    Raises:
        NoSuchPage: no source can have that key.
    """
    if (found := _KEY.fullmatch(key)) is None:
        raise NoSuchPage(f"the run has no source {key}")
    number, folder, test = found.groups()
    if test is not None:
        return _answered(run.path / "test" / test, key, "test", None)
    kind, step = _FOLDERS[folder]
    at = run.iteration(int(number))
    if kind == "dev":
        return _answered(at / folder, key, kind, int(number))
    finished = (at / step).exists()
    return Source(key, kind, int(number), _parts(at / folder, finished=finished), finished)


def _answered(stem: Path, key: str, kind: Kind, number: int | None) -> Source:
    """The table of an evaluation, or the shards of one that goes on."""
    finished = stem.with_name(f"{stem.name}.json").exists()
    if (table := stem.with_name(f"{stem.name}.parquet")).exists():
        return Source(key, kind, number, (Part("table", table),), finished)
    # One folder for each set of versions that was begun with; the newest is what goes on.
    folders = sorted(
        stem.with_name(f"{stem.name}.parts").glob("*"), key=lambda folder: folder.stat().st_mtime
    )
    return Source(key, kind, number, _parts(folders[-1], finished=finished) if folders else (), finished)


def _parts(folder: Path, *, finished: bool) -> tuple[Part, ...]:
    """Of what is finished the folder is listed once, as long as nothing is written into it."""
    if finished and folder.exists():
        return _listed(folder, folder.stat().st_mtime_ns)
    return tuple(Part(name, *files) for name, files in written_parts(folder).items())


@lru_cache(256)
def _listed(folder: Path, written: int) -> tuple[Part, ...]:
    return _parts(folder, finished=False)


def statistics_in(tasks: dict[str, Json], question: str) -> dict[str, Any]:
    """What a side-car says of the weights of a question; empty if it says nothing."""
    found: dict[str, Any] = tasks.get(question, {}).get("statistics", {})
    return found
