"""Questions from files of records, in the dialects of the usual data sets (`core.data.question_rows`).

Guarantees: a file is read whole or refused, with file, line and the way to mend it; nothing is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.core.agents.program import derive_seed
from pipeline.core.data.question_rows import to_question
from pipeline.core.errors import UserError
from pipeline.core.records import Question
from retriever_service.errors import RetrieverError
from retriever_service.passages.records import Record, open_records

_SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")


def read_questions(
    paths: Sequence[str | Path],
    *,
    root: str | Path = "",
    limit: int | None = None,
    seed: int = 0,
    hops: Sequence[int] = (),
    max_answers: int | None = None,
    with_evidence: bool = False,
) -> list[Question]:
    """All questions of the files, in their order.

    Args:
        root: folder that relative paths start from.
        limit: keep a uniform sample of this many (all if there are fewer). Which ones depends on the
            seed and the ids alone, not on the files' order; a larger limit keeps what a smaller one kept.
        hops: keep only questions of so many reasoning steps; empty: all.
        max_answers: `Question.max_answers` of all.
        with_evidence: read `Question.evidence` too, which evaluation protocols need and which may be large.

    Raises:
        UserError: a file is missing or empty, a line is wrong, or no question is left; see the message.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    for given in paths:
        path = Path(root, os.path.expanduser(given))
        before = len(questions)
        for place, record in _records(path):
            question = to_question(record, place, with_evidence=with_evidence)
            question = replace(question, max_answers=max_answers)
            if first := places.get(question.id):
                raise UserError(
                    f"{place}: id {question.id!r} was already used at {first}; give every question its own id"
                )
            places[question.id] = place
            questions.append(question)
        if len(questions) == before:
            raise UserError(f"{path} has no questions in it; name a file with questions (docs/formats.md)")
    if hops:
        questions = [question for question in questions if question.hops in hops]
        if not questions:
            raise UserError(
                f"data.hops is {list(hops)}, but no question of {', '.join(map(str, paths))} names so many hops; "
                "correct the key (for training data.train_hops, where that is set), or the field hops of the questions"
            )
    return questions if limit is None else sample_questions(questions, limit, seed)


def sample_questions(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """A uniform sample of at most `limit` questions, in their order; see `read_questions`."""
    chosen = sorted((derive_seed(seed, q.id), q.id) for q in questions)[:limit]
    keep = {id_ for _, id_ in chosen}
    return [q for q in questions if q.id in keep]


def check_splits_disjoint(
    train: Sequence[Question], dev: Sequence[Question], test: Sequence[Question] = ()
) -> None:
    """Refuse data in which a question of the dev or test set is also trained on.

    Raises:
        UserError: names the set and up to five of the ids.
    """
    train_ids = {q.id for q in train}
    for name, questions in (("dev", dev), ("test", test)):
        if shared := sorted(train_ids & {q.id for q in questions}):
            raise UserError(
                f"{len(shared)} questions of data.{name} are also in data.train ({', '.join(shared[:5])}); "
                "remove them from one of the two"
            )


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    """(place for messages, record) of a file."""
    if not path.is_file():
        raise UserError(f"no question file {path}{_neighbours(path)}")
    try:
        records = open_records(path)
        for number, record in records:
            yield records.place(number), record
    except RetrieverError as error:
        raise UserError(str(error)) from error


def _neighbours(path: Path) -> str:
    """What is there instead of a missing file."""
    if path.is_dir():
        return f"; that is a directory, name a file in it{_listing(path)}"
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either (relative paths start at data.root)"
    return _listing(path.parent) or f"; {path.parent} has no files of questions"


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.name.removesuffix(".gz").endswith(_SUFFIXES))
    return f"; there are {', '.join(names[:10])}" if names else ""
