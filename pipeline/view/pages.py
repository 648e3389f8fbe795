"""Every page of data, by its name: the same for a server and for exported files.

runs                              which runs there are
run/N                             run N: how it stands, its report, configuration and sources
ids/N/SOURCE                      ids of the questions of a source, part by part
rows/N/SOURCE/PART                a line per question
details/N/SOURCE/PART/PAGE        trajectories
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.core.errors import UserError
from pipeline.core.run import Json, RunFiles, finite, read_json
from pipeline.core.status import run_status
from pipeline.view.details import PER_PAGE, details_of
from pipeline.view.questions import Asked
from pipeline.view.rows import rows_of
from pipeline.view.sources import Part, Source, sources_of


class NoSuchPage(LookupError):
    """There is no page of that name, or not any more."""


class Viewed:
    """One run, which may be going on.

    Raises:
        UserError: the directory holds no run.
    """

    def __init__(self, path: Path) -> None:
        run_status(path)
        self.run = RunFiles(path)
        self.asked = Asked(self.run)

    def overview(self) -> Json:
        sources = sources_of(self.run)
        return {
            "status": run_status(self.run.path),
            "report": read_json(self.run.path / "report.json"),
            "config": yaml.safe_dump(self.asked.config, sort_keys=False, allow_unicode=True),
            "sources": [_about(source) for source in sources],
        }

    def source(self, key: str) -> Source:
        for source in sources_of(self.run):
            if source.key == key:
                return source
        raise NoSuchPage(f"the run has no source {key}")


def _about(source: Source) -> Json:
    return {
        "key": source.key,
        "kind": source.kind,
        "name": source.name,
        "iteration": source.iteration,
        "finished": source.finished,
        "parts": [
            {"name": part.name, "rows": int(pq.read_metadata(part.path).num_rows)} for part in source.parts
        ],
    }


class Pages:
    """Of some runs.

    Args:
        live: the runs may go on; else they are as they are for good.

    Raises:
        UserError: one of the directories holds no run.
    """

    def __init__(self, runs: Sequence[Path], *, live: bool) -> None:
        self._runs = [Viewed(path) for path in runs]
        self._live = live

    @cached_property
    def _names(self) -> list[str]:
        """Of the directories; with as many of those above as tell them apart."""
        paths = [viewed.run.path for viewed in self._runs]
        for depth in range(1, max(len(path.parts) for path in paths) + 1):
            names = ["/".join(path.parts[-depth:]) for path in paths]
            if len(set(names)) == len(names):
                return names
        return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]

    def page(self, name: str) -> Json:
        """
        Raises:
            NoSuchPage: there is none of that name.
            UserError: a file of the run is damaged.
        """
        try:
            found: Json = finite(self._page(*name.split("/")))
            return found
        except (FileNotFoundError, IndexError, NoSuchPage) as error:
            raise NoSuchPage(f"there is no page {name} (any more): {error}") from error
        except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{name}: a file of the run is damaged, or of another version ({error!r:.200})"
            ) from error

    def prepare(self) -> None:
        """Load what takes a while, before it is asked for."""
        for viewed in self._runs:
            _ = viewed.asked.tokenizer

    def names(self) -> Iterator[str]:
        """Of all pages that there are now."""
        yield "runs"
        for number, viewed in enumerate(self._runs):
            yield f"run/{number}"
            for source in sources_of(viewed.run):
                yield f"ids/{number}/{source.key}"
                for part in source.parts:
                    yield f"rows/{number}/{source.key}/{part.name}"
                    for page in range(math.ceil(len(_ids(part)) / PER_PAGE)):
                        yield f"details/{number}/{source.key}/{part.name}/{page}"

    def _page(self, kind: str, *rest: str) -> Json:
        match kind, *rest:
            case ["runs"]:
                return self._list()
            case ["run", number]:
                return self._run(number).overview()
            case ["ids", number, key]:
                return {"parts": {part.name: _ids(part) for part in self._run(number).source(key).parts}}
            case ["rows", number, key, name]:
                viewed = self._run(number)
                source = viewed.source(key)
                return rows_of(source, _part(source, name), viewed.asked)
            case ["details", number, key, name, page]:
                viewed = self._run(number)
                source = viewed.source(key)
                return details_of(source, _part(source, name), _number(page), viewed.asked)
        raise NoSuchPage("none has such a name")

    def _run(self, number: str) -> Viewed:
        return self._runs[_number(number)]

    def _list(self) -> Json:
        runs: list[dict[str, Any]] = [
            {"name": name, "path": str(viewed.run.path), "recipe": viewed.asked.recipe}
            for name, viewed in zip(self._names, self._runs, strict=True)
        ]
        return {"runs": runs, "live": self._live, "per_page": PER_PAGE}


def _number(text: str) -> int:
    if not text.isdecimal():
        raise NoSuchPage(f"{text} is no number")
    return int(text)


def _part(source: Source, name: str) -> Part:
    for part in source.parts:
        if part.name == name:
            return part
    raise NoSuchPage(f"{source.key} has no part {name}")


def _ids(part: Part) -> list[str]:
    """Of its questions, each once, in their order."""
    column = pq.read_table(part.path, columns=["question_id"]).column("question_id")
    return list(dict.fromkeys(column.to_pylist()))
