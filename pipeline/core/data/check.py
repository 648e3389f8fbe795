"""Looks at questions and corpus before anything is trained: what makes a score say something else than it seems to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.core.config import DataConfig, RetrieverConfig
from pipeline.core.data.coverage import EvidenceSearch
from pipeline.core.data.doubles import FEW, Pair, PassageCounter, repeated_wordings, shared_wordings
from pipeline.core.records import Question
from pipeline.core.retrieval import corpus_paths
from retriever_service.index.store import open_index
from retriever_service.passages.corpus import Passage, stream_corpus

Json = dict[str, Any]
Passages = Callable[[], Iterable[Passage]]

STEP = 1000
"""Passages between two words about progress."""


def check_questions(sets: Mapping[str, Sequence[Question]], apart: Sequence[Question] = ()) -> Json:
    """What questions alone show.

    Args:
        sets: by name; the one called `train` is compared with the others.
        apart: further questions that are trained on.

    Returns:
        questions   {set: number}
        leaks       {set: {questions, examples}} of each set but train: how many ask in the same words what is learnt
        repeated    {set: {questions, examples}}: how many ask what a question before them in the set has asked
    """
    train = [*sets.get("train", ()), *apart]
    asked = {name: questions for name, questions in sets.items() if name != "train"}
    return {
        "questions": {name: len(questions) for name, questions in sets.items()},
        "leaks": {name: _counted(shared_wordings(train, questions)) for name, questions in asked.items()},
        "repeated": {name: _counted(repeated_wordings(questions)) for name, questions in sets.items()},
    }


def check_corpus(
    sets: Mapping[str, Sequence[Question]],
    passages: Passages,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Json:
    """What the corpus shows, in one pass.

    Args:
        passages: gives all, each time that it is called.
        on_progress: told how many were looked at.

    Returns:
        passages    {passages, duplicates, examples}, see `PassageCounts`
        coverage    {set: `Coverage` with its percentage}
    """
    search = EvidenceSearch([question for questions in sets.values() for question in questions])
    counter = PassageCounter()
    done = 0
    for done, passage in enumerate(passages(), start=1):
        search.look_at(passage)
        counter.look_at(passage)
        if done % STEP == 0:
            on_progress(done)
    on_progress(done)
    return {
        "passages": asdict(counter.counts(passages)),
        "coverage": {name: search.coverage(questions).as_json() for name, questions in sets.items()},
    }


def passages_of(data: DataConfig, retriever: RetrieverConfig) -> Passages | None:
    """Gives all passages at each call: those of `data.corpus`, else of the index that is searched; None without both.

    Raises:
        RetrieverError: a damaged index; while iterating, a bad corpus.
    """
    if data.corpus:
        return lambda: stream_corpus(corpus_paths(data))
    if retriever.index is not None:
        corpus = open_index(retriever.index).corpus
        return lambda: corpus
    return None


def warnings_of(found: Json) -> list[str]:
    """What of a check a person should know, each in one line; empty where all is well."""
    lines = [
        f"{leak['questions']} questions of {name} are also in train, in the same words under other ids "
        f"({_pairs(leak)}); take them out of one of the two"
        for name, leak in found["leaks"].items()
        if leak["questions"]
    ]
    lines += [
        f"{again['questions']} questions of {name} are there twice, under other ids ({_pairs(again)})"
        for name, again in found["repeated"].items()
        if again["questions"]
    ]
    if (passages := found.get("passages")) and passages["duplicates"]:
        lines.append(
            f"{passages['duplicates']:,} of {passages['passages']:,} passages say what another one says "
            f"({_pairs(passages)}): a search may find one text several times"
        )
    for name, cover in found.get("coverage", {}).items():
        lines += _about_coverage(name, cover)
    return lines


def _about_coverage(name: str, cover: Json) -> list[str]:
    lines = []
    if missing := cover["with_gold"] - cover["gold_found"]:
        lines.append(
            f"{missing} questions of {name} name gold passages that the corpus does not have "
            f"({', '.join(cover['missing_gold'])})"
        )
    if lost := cover["judged"] - cover["covered"]:
        lines.append(
            f"{lost} of {cover['judged']} questions of {name} have neither their gold passages nor an answer in the "
            "corpus: no retriever can find the evidence"
        )
    return lines


def _counted(pairs: Sequence[Pair]) -> Json:
    return {"questions": len(pairs), "examples": pairs[:FEW]}


def _pairs(counted: Json) -> str:
    return ", ".join(" and ".join(pair) for pair in counted["examples"])
