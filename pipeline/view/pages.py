"""Every page of data, by its name: the same for a server and for exported files.

runs                              which runs there are
run/N                             run N: how it stands, its report, configuration and sources
ids/N/SOURCE/COUNT/PLACE          where the questions of a source are
rows/N/SOURCE/PART/PAGE           a line per question
details/N/SOURCE/PART/PAGE        trajectories
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import UserError
from pipeline.core.run import Json, RunFiles, finite, read_json
from pipeline.core.status import distinct_names, run_status
from pipeline.view.details import PER_PAGE, details_of
from pipeline.view.places import places_of, spread_of
from pipeline.view.questions import Asked
from pipeline.view.rows import PER_PAGE as LINES_PER_PAGE
from pipeline.view.rows import rows_of
from pipeline.view.sources import Part, Source, source_of, sources_of
from pipeline.view.stored import NoSuchPage

OF_THE_MACHINE = ("run", "process", "last_warnings", "mirror")
"""Of how a run stands: what says where it is and who made it. Left out of exported pages."""


class Viewed:
    """One run, which may be going on.

    Raises:
        UserError: the directory holds no run.
    """

    def __init__(self, path: Path) -> None:
        run_status(path)  # refuses what is none
        self.run = RunFiles(path)
        self.asked = Asked(self.run)

    def overview(self) -> Json:
        """Everything but the questions. A part that cannot be read has no number of rows."""
        return {
            "status": run_status(self.run.path),
            "report": read_json(self.run.path / "report.json"),
            "config": yaml.safe_dump(self.asked.config, sort_keys=False, allow_unicode=True),
            "sources": [_about(source) for source in sources_of(self.run)],
        }

    def source(self, key: str) -> Source:
        return source_of(self.run, key)


def _about(source: Source) -> Json:
    return {
        "key": source.key,
        "kind": source.kind,
        "split": source.split,
        "name": source.name,
        "iteration": source.iteration,
        "finished": source.finished,
        "spread": spread_of(source),
        "parts": [{"name": part.name, "rows": _rows_in(part)} for part in source.parts],
    }


def _rows_in(part: Part) -> int | None:
    try:
        return part.num_rows()
    except (NoSuchPage, UserError):  # whoever looks at it is told
        return None


class Pages:
    """Of some runs.

    Args:
        live: the runs may go on, on this machine; else they are as they are for good, and shown elsewhere.

    Raises:
        UserError: one of the directories holds no run.
    """

    def __init__(self, runs: Sequence[Path], *, live: bool) -> None:
        self._runs = [Viewed(path) for path in runs]
        self._live = live
        self._shown = threading.Event()

    @property
    def paths(self) -> list[Path]:
        """Of the runs."""
        return [viewed.run.path for viewed in self._runs]

    @cached_property
    def _names(self) -> list[str]:
        return distinct_names(self.paths)

    def page(self, name: str) -> Json:
        """The content of a page, ready for JSON.

        Raises:
            NoSuchPage: there is none of that name, or not any more.
            UserError: a file of the run is damaged.
        """
        try:
            found: Json = finite(self._page(*name.split("/")))
        except NoSuchPage as error:
            raise NoSuchPage(f"there is no page {name}: {error}") from error
        return found

    def prepare(self) -> None:
        """Load what takes a while before it is asked for, behind the first page of a run: that is to come at once."""
        self._shown.wait()
        for viewed in self._runs:
            viewed.asked.tokenizer("searcher")
            for split in {source.split for source in sources_of(viewed.run)}:
                viewed.asked.of(split)

    def names(self) -> Iterator[str]:
        """Of all pages that there are now.

        Raises:
            NoSuchPage, UserError: a file of a run is gone or damaged.
        """
        yield "runs"
        for number, viewed in enumerate(self._runs):
            yield f"run/{number}"
            for source in sources_of(viewed.run):
                count = spread_of(source)
                yield from (f"ids/{number}/{source.key}/{count}/{place}" for place in range(count))
                for part in source.parts:
                    questions = len(part.questions())
                    for kind, per_page in (("rows", LINES_PER_PAGE), ("details", PER_PAGE)):
                        for page in range(math.ceil(questions / per_page)):
                            yield f"{kind}/{number}/{source.key}/{part.name}/{page}"

    def _page(self, kind: str, *rest: str) -> Json:
        match kind, *rest:
            case ["runs"]:
                return self._list()
            case ["run", number]:
                found = self._run(number).overview()
                self._shown.set()
                if not self._live:
                    found["status"] = {k: v for k, v in found["status"].items() if k not in OF_THE_MACHINE}
                return found
            case ["ids", number, key, count, place]:
                viewed = self._run(number)
                return places_of(viewed.source(key), _number(count), _number(place), viewed.asked)
            case ["rows", number, key, name, page]:
                viewed = self._run(number)
                source = viewed.source(key)
                return rows_of(source, source.part(name), _number(page), viewed.asked)
            case ["details", number, key, name, page]:
                viewed = self._run(number)
                source = viewed.source(key)
                return details_of(source, source.part(name), _number(page), viewed.asked)
        raise NoSuchPage("none has such a name")

    def _run(self, number: str) -> Viewed:
        if (place := _number(number)) >= len(self._runs):
            raise NoSuchPage(f"there are {len(self._runs)} runs")
        return self._runs[place]

    def _list(self) -> Json:
        runs: list[dict[str, Any]] = [
            {
                "name": name,
                "path": str(viewed.run.path) if self._live else None,
                "recipe": viewed.asked.recipe,
            }
            for name, viewed in zip(self._names, self._runs, strict=True)
        ]
        return {
            "runs": runs,
            "live": self._live,
            "per_page": PER_PAGE,
            "lines_per_page": LINES_PER_PAGE,
        }


def _number(text: str) -> int:
    if not text.isdecimal():
        raise NoSuchPage(f"{text!r} is no number")
    return int(text)
