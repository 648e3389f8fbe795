"""Writes an experiment's part of a page of results: `FOLDER/results.md`, with its plots and numbers in
`FOLDER/figures/`.

The part stands between two comments. Whatever is outside them is somebody's text and stays as it is.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.experiments.numbers import write_numbers
from pipeline.core.experiments.plots import draw
from pipeline.core.experiments.results import Results
from pipeline.core.experiments.spec import FIGURES
from pipeline.core.experiments.tables import make_table, prose
from pipeline.core.run import write_atomically
from pipeline.core.scoring.answers import METRICS

PAGE = "results.md"


def check_page(folder: Path, name: str) -> None:
    """
    Raises:
        UserError: the experiment's part of the page has lost one of its comments, or the page cannot be read.
    """
    _around(_text(folder), name, folder / PAGE)


def write_page(results: Results, folder: Path, command: str) -> list[Path]:
    """Write the part anew, numbers and plots first. The same results give the same bytes.

    Args:
        command: that makes all of it.

    Returns:
        the files that were written.

    Raises:
        UserError: see `check_page`.
    """
    experiment = results.experiment
    numbers = write_numbers(folder, experiment.name, results.numbers)
    drawn = []
    for plot in experiment.spec.plots:
        path = folder / FIGURES / f"{experiment.name}-{plot}.svg"
        if draw(plot, results, path):
            drawn.append(path)
    part = _part(results, command, drawn)
    before, behind = _around(_text(folder), experiment.name, folder / PAGE)
    write_atomically(folder / PAGE, f"{before}{part}{behind}")
    return [folder / PAGE, *drawn, numbers]


def _part(results: Results, command: str, drawn: list[Path]) -> str:
    experiment, spec = results.experiment, results.experiment.spec
    begin, end = _comments(experiment.name)
    blocks = [begin, f"## {spec.title}", *([prose(spec.about)] if spec.about.strip() else [])]
    blocks.append(f"```bash\n{command}\n```")
    if results.arms:
        blocks.append(prose(_how_to_read(results)))
        blocks += [make_table(table, results) for table in spec.tables]
        blocks += [f"![{spec.title}: {path.stem}]({FIGURES}/{path.name})" for path in drawn]
    if results.missing:
        of = len(results.missing)
        runs = "; ".join(results.missing)
        blocks.append(prose(f"Not finished, and not in the tables: {of} run{'s' * (of > 1)} ({runs})."))
    return "\n\n".join([*blocks, end]) + "\n"


def _how_to_read(results: Results) -> str:
    spec = results.experiment.spec
    counts = sorted({len(found.questions) for found in results.arms})
    questions = " to ".join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)])
    seeds = sorted({run.seed for found in results.arms for run in found.runs})
    over = f"the {len(seeds)} seeds and the questions" if len(seeds) > 1 else "the questions"
    return (
        f"{METRICS[spec.metric]} in percent; {questions} test questions. 95 %: bootstrap over {over}; differences are "
        "paired, seed by seed and question by question."
    )


def _comments(name: str) -> tuple[str, str]:
    return f"<!-- experiment {name}: written by exsearch experiment -->", f"<!-- end of experiment {name} -->"


def _text(folder: Path) -> str:
    path = folder / PAGE
    try:
        return path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error!s:.200}); choose another --results folder") from error


def _around(text: str, name: str, path: Path) -> tuple[str, str]:
    """What stands before an experiment's part and behind it; a part that is not there yet comes last."""
    begin, end = _comments(name)
    if (text.count(begin), text.count(end)) == (0, 0):
        return text.rstrip("\n") + "\n\n", ""
    before, found, rest = text.partition(begin)
    _, closed, behind = rest.partition(end)
    if not (found and closed) or text.count(begin) > 1:
        raise UserError(
            f"{path}: the part of {name} should stand once between {begin!r} and {end!r}; mend it by hand"
        )
    return before, behind.removeprefix("\n")
