"""The files that the product reads: how a whole one is made, and who reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Make = Callable[[Path], None]
"""Fills an empty folder."""
Read = Callable[[Path], int]
"""Reads the folder; how many records there were."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Someone who reads files of one folder.

    Attributes:
        files: which of them are damaged, one at a time.
        may_be_empty: no record and no error is an answer: such a file may be missing, or hold nothing yet.
        is_native: code that is not Python's own reads them, and could take its process along.
    """

    name: str
    make: Make
    read: Read
    files: Sequence[str]
    may_be_empty: bool = False
    is_native: bool = False


PASSAGES: list[dict[str, Any]] = [
    {
        "id": f"p{n}",
        "title": f"Title {n}",
        "text": f"Orvane made the harp number {n}, in Zürich.",
        "metadata": {"year": 1900 + n},
    }
    for n in range(4)
]
QUESTIONS: list[dict[str, Any]] = [
    {
        "id": f"q{n}",
        "question": f"Who made the harp number {n}?",
        "answers": ["Orvane", "Örvane"],
        "supporting_ids": [f"p{n}"],
        "type": "bridge",
    }
    for n in range(3)
]
HOTPOTQA = [
    {
        "_id": f"h{n}",
        "question": "Who made it?",
        "answer": "Orvane",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": [["Title", 0]],
        "context": [["Title", ["Orvane made it.", " It was long ago."]]],
    }
    for n in range(2)
]
MUSIQUE = [
    {
        "id": f"2hop__{n}_{n}",
        "question": "Who made it?",
        "answer": "Orvane",
        "answer_aliases": ["O."],
        "answerable": True,
        "paragraphs": [
            {"idx": 0, "title": "Title", "paragraph_text": "Orvane made it.", "is_supporting": True}
        ],
        "question_decomposition": [
            {"id": 1, "question": "harp >> maker", "answer": "Orvane", "paragraph_support_idx": 0}
        ],
    }
    for n in range(2)
]


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def holding(contents: Mapping[str, str]) -> Make:
    """Text files."""

    def make(folder: Path) -> None:
        for name, text in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")

    return make


def data_files() -> list[Reader]:
    """What users bring."""
    from pipeline.core.config.loading import load_config
    from pipeline.core.data.questions import read_questions
    from retriever_service.passages.corpus import CorpusReader
    from retriever_service.passages.evaluation import read_qrels, read_queries, read_run

    def corpus(name: str) -> Read:
        return lambda folder: sum(1 for _ in CorpusReader([folder / name]))

    def questions(name: str) -> Read:
        return lambda folder: len(read_questions([folder / name], with_evidence=True))

    def one(name: str, text: str, read: Read, what: str) -> Reader:
        return Reader(what, holding({name: text}), read, [name])

    queries = lines([{"_id": row["id"], "text": row["question"]} for row in QUESTIONS])
    return [
        one("corpus.jsonl", lines(PASSAGES), corpus("corpus.jsonl"), "corpus, JSON Lines"),
        one("corpus.json", json.dumps(PASSAGES), corpus("corpus.json"), "corpus, a list"),
        one("corpus.tsv", "id\ttitle\ttext\np0\tTitle\tText\n", corpus("corpus.tsv"), "corpus, a table"),
        one("questions.jsonl", lines(QUESTIONS), questions("questions.jsonl"), "questions, JSON Lines"),
        one("dev.json", json.dumps(HOTPOTQA), questions("dev.json"), "questions of HotpotQA"),
        one("dev.jsonl", lines(MUSIQUE), questions("dev.jsonl"), "questions of MuSiQue"),
        one(
            "qrels.tsv",
            "query-id\tcorpus-id\tscore\nq0\tp0\t1\n",
            lambda folder: len(read_qrels(folder / "qrels.tsv")),
            "relevance judgements",
        ),
        one(
            "queries.jsonl",
            queries,
            lambda folder: len(read_queries(folder / "queries.jsonl")),
            "queries of BEIR",
        ),
        one(
            "run.trec",
            "q0 Q0 p0 1 1.5 tag\n",
            lambda folder: len(read_run(folder / "run.trec")),
            "ranking of TREC",
        ),
        one(
            "config.yaml",
            'model:\n  path: "models/tiny-searcher"\nseed: 3\n',
            lambda folder: len(load_config(folder / "config.yaml").model_dump()),
            "configuration",
        ),
        *predictions(),
    ]


def predictions() -> list[Reader]:
    from pipeline.core.records import Question
    from pipeline.core.scoring.files import read_predictions, write_predictions
    from pipeline.core.scoring.prediction import Prediction

    asked = [Question(f"q{n}", f"Who made harp {n}?", ("Orvane",)) for n in range(2)]
    said = {question.id: Prediction(answer="Orvane") for question in asked}

    def of(protocol: Any, name: str) -> Reader:
        return Reader(
            f"predictions, {protocol}",
            lambda folder: write_predictions(protocol, folder / name, asked, said),
            lambda folder: len(read_predictions(protocol, folder / name, asked)),
            [name],
        )

    names = {
        "hotpotqa": "p.json",
        "musique": "p.jsonl",
        "kilt": "p.jsonl",
        "nq": "p.jsonl",
        "bamboogle": "p.json",
    }
    return [of(protocol, name) for protocol, name in names.items()]
