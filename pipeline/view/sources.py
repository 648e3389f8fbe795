"""Which trajectories a run has, phase by phase; also of a phase that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.core.run import RunFiles
from pipeline.core.shards import written_parts

Kind = Literal["samples", "dev samples", "dev", "test"]


@dataclass(frozen=True, slots=True)
class Part:
    """A Parquet file of trajectories, by its name in the source.

    Attributes:
        side_car: what was counted of each question; None of evaluations.
        examples: by policy, the training examples that were made of it.
    """

    name: str
    path: Path
    side_car: Path | None = None
    examples: Mapping[str, Path] = field(default_factory=dict)


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
    def split(self) -> Literal["train", "dev", "test"]:
        """Of its questions."""
        return "train" if self.kind == "samples" else "test" if self.kind == "test" else "dev"

    @property
    def name(self) -> str:
        """Of a test; else of the kind."""
        return self.key.removeprefix("test-") if self.kind == "test" else self.kind


def sources_of(run: RunFiles) -> list[Source]:
    """In the order in which they were made; those without a complete part are left out."""
    return [source for source in _sources(run) if source.parts]


def _sources(run: RunFiles) -> Iterator[Source]:
    for number in sorted(int(path.name) for path in run.path.glob("iterations/[0-9]*")):
        folder = run.iteration(number)
        yield _sampled(folder / "rollouts", "samples", number, (folder / "sample.json").exists())
        yield _answered(folder / "evaluation", f"{number:04d}-evaluation", "dev", number)
        yield _sampled(folder / "dev_samples", "dev samples", number, (folder / "dev_bound.json").exists())
    tests = {path.stem for path in (run.path / "test").glob("*") if path.suffix in (".parquet", ".parts")}
    for name in sorted(tests, key=lambda name: _begun(run.path / "test" / name)):
        yield _answered(run.path / "test" / name, f"test-{name}", "test", None)


def _sampled(folder: Path, kind: Kind, number: int, finished: bool) -> Source:
    return Source(f"{number:04d}-{folder.name}", kind, number, _parts(folder), finished)


def _answered(stem: Path, key: str, kind: Kind, number: int | None) -> Source:
    """The table of an evaluation, or the shards of one that goes on."""
    if (table := stem.with_name(f"{stem.name}.parquet")).exists():
        finished = stem.with_name(f"{stem.name}.json").exists()
        return Source(key, kind, number, (Part("table", table),), finished)
    folders = sorted(
        stem.with_name(f"{stem.name}.parts").glob("*"), key=lambda folder: folder.stat().st_mtime
    )
    return Source(key, kind, number, _parts(folders[-1]) if folders else (), finished=False)


def _parts(folder: Path) -> tuple[Part, ...]:
    return tuple(
        Part(
            name,
            path,
            side_car,
            {found.parts[-3]: found for found in folder.parent.glob(f"*/examples/{path.name}")},
        )
        for name, (path, side_car) in written_parts(folder).items()
    )


def _begun(stem: Path) -> float:
    """When the first of its files was last written."""
    found = [
        path for suffix in (".parquet", ".parts") if (path := stem.with_name(stem.name + suffix)).exists()
    ]
    return min(path.stat().st_mtime for path in found)
