"""The look at questions and corpus that a run takes before it learns from them; its report has what was found."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core.config import Config
from pipeline.core.data.check import check_corpus, check_questions, warnings_of
from pipeline.core.data.questions import read_questions
from pipeline.core.data.splits import Splits
from pipeline.core.display import Display
from pipeline.core.records import Question
from pipeline.core.retrieval import Searched
from pipeline.core.run import DATA_FILE, Json, read_json, write_json
from retriever_service.index.store import open_index

logger = logging.getLogger(__name__)

MOST_PASSAGES = 1_000_000
"""Two minutes. A larger corpus is left to `exsearch data check`."""


def look_at_data(run: Path, config: Config, splits: Splits, searched: Searched, display: Display) -> None:
    """Write what `exsearch data check` would find into the run directory, once, and warn of what is wrong."""
    if read_json(run / DATA_FILE) is not None:
        return
    named = {"train": splits.train, "dev": splits.dev, "test": splits.test}
    sets = {name: questions for name, questions in named.items() if questions}
    sources = config.cold_start.sources
    found = check_questions(sets, read_questions(sources, root=config.data.root) if sources else [])
    found |= look_at_corpus(sets, searched, display)
    for line in warnings_of(found):
        logger.warning(line)
    write_json(run / DATA_FILE, found)


def look_at_corpus(sets: Mapping[str, Sequence[Question]], searched: Searched, display: Display) -> Json:
    """As `check_corpus`, of the index that is searched; empty where servers are, or more than `MOST_PASSAGES`."""
    corpus = open_index(searched).corpus if isinstance(searched, Path) else None
    if corpus is None or len(corpus) > MOST_PASSAGES:
        display.line("evidence coverage is not looked at here: see exsearch data check")
        return {}
    with display.progress("looking at the corpus", len(corpus), "passages") as advance:
        return check_corpus(sets, lambda: corpus, lambda done: advance.to(done, len(corpus)))
