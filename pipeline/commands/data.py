"""Bring data, and look at them before they are trained on (`exsearch data`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.core.config import Config
from pipeline.core.data.check import check_corpus, check_questions, passages_of, warnings_of
from pipeline.core.data.fetch import fetching
from pipeline.core.data.questions import read_questions
from pipeline.core.data.splits import load_splits
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.run import Json

LEGEND = (
    "judged: with gold passages, or an answer to look for (not yes or no); gold there: of those with gold passages, "
    "all are in the corpus; answer there: some passage holds an answer; covered: share of the judged with either"
)
"""What the columns of `exsearch data check` count."""


def check_data(config: Config, display: Display) -> Json:
    """Leaks, doubles and evidence coverage of the questions and passages that a configuration names.

    Returns:
        What `check_questions` and `check_corpus` do; without the latter's where it names no passages.

    Raises:
        UserError, RetrieverError: no questions, bad input, or a question id that is trained on and asked.
    """
    splits = load_splits(config.data, config.seed, apart=config.cold_start.sources)
    named = {"train": splits.train, "dev": splits.dev, "test": splits.test}
    sets = {name: questions for name, questions in named.items() if questions}
    if not sets:
        raise UserError("there are no questions to look at; set data.train, data.dev or data.test")
    sources = config.cold_start.sources
    apart = read_questions(sources, root=config.data.root) if sources else []
    found = check_questions(sets, apart)
    passages = passages_of(config.data, config.retriever)
    if passages is None:
        return found
    with display.progress("looking at the corpus", None, "passages") as advance:
        return found | check_corpus(sets, passages, lambda done: advance.to(done, done))


def fetch(name: str, out: Path, source: str | None, display: Display) -> Json:
    """Fetch a data set into `out`; returns its name, licence, counts and evidence coverage.

    Raises:
        UserError, RetrieverError: see `pipeline.core.data.fetch.fetching.fetch`.
    """
    with display.progress(f"fetching {name}", None, "records") as advance:
        manifest = fetching.fetch(name, out, source, lambda split, done: advance.to(done, done))
    coverage = manifest["check"].get("coverage", {})
    return {
        "out": str(out),
        **{key: manifest[key] for key in ("name", "licence", "note", "splits", "passages")},
        "coverage": {split: cover["percent"] for split, cover in coverage.items()},
    }


def print_check(found: Json, console: Console) -> None:
    """The figures as a table, then what to look at."""
    table = Table(title="evidence coverage", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("set", "questions", "judged", "covered", "gold there", "answer there"):
        table.add_column(name, justify="left" if name == "set" else "right")
    for name, number in found["questions"].items():
        table.add_row(name, f"{number:,}", *_cells(found.get("coverage", {}).get(name)))
    console.print(table)
    if found.get("coverage"):
        console.print(LEGEND, markup=False, emoji=False, highlight=False, soft_wrap=True)
    lines = warnings_of(found)
    if "passages" not in found:
        lines.append("no passages were looked at: set data.corpus, or retriever.index")
    for line in lines or ["nothing is there twice, and no gold passage is missing"]:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _cells(cover: Json | None) -> Sequence[str]:
    if cover is None:
        return ()
    percent = "" if cover["percent"] is None else f"{cover['percent']:.1f}%"
    gold = f"{cover['gold_found']:,} of {cover['with_gold']:,}" if cover["with_gold"] else ""
    return f"{cover['judged']:,}", percent, gold, f"{cover['answer_found']:,}"
