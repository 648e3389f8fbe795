"""Queries of a retrieval task, with their instructions and judgements.

Guarantees:
- a query without an instruction has an empty one, whether the field is absent, null or blank;
- a judgement is read as it stands, graded or not, from a file of judgements or from the query's own `labels`, or
  `supporting_ids`;
- what is not asked is counted: queries that nobody judged, judgements of queries that are not there;
- a mistake is a `RetrieverError` that names file and line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.benchmarks.spec import QueriesConfig
from retriever_service.errors import RetrieverError
from retriever_service.passages.corpus import Passage
from retriever_service.passages.evaluation import read_qrels
from retriever_service.passages.records import open_records

_IDS = ("_id", "id", "qid")
_TEXTS = ("text", "query", "question")
_INSTRUCTIONS = ("instruction", "prompt")
_GRADES = ("relevance", "score")
_POSITIVES, _NEGATIVES = ("pos", "positive"), ("neg", "negative")


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a task. `gold`: relevance by passage id, above 0 is relevant. `instruction`: empty for none."""

    id: str
    text: str
    instruction: str
    gold: Mapping[str, int]

    @property
    def relevant(self) -> list[str]:
        """Ids of the relevant passages."""
        return [id_ for id_, relevance in self.gold.items() if relevance > 0]


@dataclass(frozen=True, slots=True)
class TaskQueries:
    """The queries that are asked, in the order of their file, and how many are not.

    unjudged: queries without a judgement. unknown: judged queries that the file does not have. not_drawn: left out by
    `limit`.
    """

    queries: tuple[Query, ...]
    unjudged: int = 0
    unknown: int = 0
    not_drawn: int = 0

    @property
    def has_instructions(self) -> bool:
        return any(query.instruction for query in self.queries)


def read_task(config: QueriesConfig, root: Path, seed: int) -> TaskQueries:
    """The queries of a task.

    Args:
        seed: of the draw where there is a `limit`.

    Raises:
        RetrieverError: no such file, a malformed record, an id that comes twice, or nothing that is judged.
    """
    path = root / config.queries
    qrels = None if config.qrels is None else read_qrels(root / config.qrels)
    queries: list[Query] = []
    seen: set[str] = set()
    unjudged = 0
    records = open_records(path)
    for number, record in records:
        place = records.place(number)
        id_ = _identifier(_first(record, _IDS), place)
        text = _first(record, _TEXTS)
        if not isinstance(text, str) or not text.strip():
            raise RetrieverError(f"{place}: query {id_!r} has no text ({', '.join(_TEXTS)})")
        if id_ in seen:
            raise RetrieverError(
                f"{place}: query {id_!r} appears twice; give every query of a task its own id"
            )
        seen.add(id_)
        gold = _labels(record, place) if qrels is None else qrels.get(id_, {})
        if not gold:
            unjudged += 1
            continue
        queries.append(Query(id_, text, _instruction(record, config.instruction, place), gold))
    if not queries:
        judged_in = path if config.qrels is None else root / config.qrels
        raise RetrieverError(f"no query of {path} is judged in {judged_in}; do they belong together?")
    unknown = 0 if qrels is None else len(qrels.keys() - seen)
    drawn = _draw(queries, config.limit, seed)
    return TaskQueries(tuple(drawn), unjudged, unknown, len(queries) - len(drawn))


def read_pairs(path: Path, limit: int | None, seed: int) -> tuple[TaskQueries, list[Passage]]:
    """Rows of texts without ids, as ToolRet's training set has them: {query, prompt, pos, neg}, the last two lists.

    A passage is a different text; its id is of the text. `pos` may be called `positive`, `neg` `negative`.

    Raises:
        RetrieverError: no such file, or a malformed row.
    """
    passages: dict[str, Passage] = {}

    def id_of(text: object, place: str) -> str:
        if not isinstance(text, str) or not text.strip():
            raise RetrieverError(
                f"{place}: pos and neg must be lists of texts that are not empty, got {text!r:.100}"
            )
        id_ = hashlib.sha256(text.encode()).hexdigest()[:16]
        passages.setdefault(id_, Passage(id_, "", text))
        return id_

    queries: list[Query] = []
    records = open_records(path)
    for number, record in records:
        place = records.place(number)
        texts = [_first(record, names) for names in (_POSITIVES, _NEGATIVES)]
        if not isinstance(texts[0], list) or not texts[0] or not isinstance(texts[1], list | None):
            raise RetrieverError(
                f"{place}: a row needs pos, a list of texts, and may have neg (fields: {_fields(record)})"
            )
        asked = record.get("query")
        if not isinstance(asked, str) or not asked.strip():
            raise RetrieverError(f"{place}: the row has no query")
        gold = {id_of(text, place): 1 for text in texts[0]}
        for text in texts[1] or ():
            id_of(text, place)
        queries.append(Query(f"row-{number}", asked, _instruction(record, None, place), gold))
    if not queries:
        raise RetrieverError(f"{path}: no rows")
    drawn = _draw(queries, limit, seed)
    return TaskQueries(tuple(drawn), not_drawn=len(queries) - len(drawn)), list(passages.values())


def holds_pairs(path: Path) -> bool:
    """Whether the first row of a file is one of `read_pairs`.

    Raises:
        RetrieverError: no such file.
    """
    first = next(iter(open_records(path)), None)
    return first is not None and _first(first[1], _POSITIVES) is not None


def _draw(queries: list[Query], limit: int | None, seed: int) -> list[Query]:
    if limit is None or limit >= len(queries):
        return queries
    rows = np.random.default_rng(seed).permutation(len(queries))[:limit]
    return [queries[row] for row in sorted(rows)]


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(record))[:200] or "none"


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _identifier(value: Any, place: str) -> str:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text:
        raise RetrieverError(f"{place}: no id ({', '.join(_IDS)}), or an empty one")
    return text


def _instruction(record: Mapping[str, Any], of_task: str | None, place: str) -> str:
    own = _first(record, _INSTRUCTIONS)
    if own is not None and not isinstance(own, str):
        raise RetrieverError(f"{place}: the instruction must be a string, is {type(own).__name__}")
    return (own or "").strip() or (of_task or "").strip()


def _labels(record: Mapping[str, Any], place: str) -> dict[str, int]:
    """Relevance by passage id: `labels` is a list of {id, relevance} or {id, score}, or that list as JSON text. In its
    place our own question files have `supporting_ids`."""
    labels = record.get("labels")
    if labels is None and isinstance(ids := record.get("supporting_ids"), list):
        labels = [{"id": id_} for id_ in ids]
    if isinstance(labels, str):
        try:
            labels = json.loads(labels)
        except ValueError as error:
            raise RetrieverError(f"{place}: labels are no JSON ({error})") from error
    if not isinstance(labels, list):
        raise RetrieverError(
            f"{place}: no list of labels (fields: {_fields(record)}); name a file of judgements "
            "as qrels, or give each query labels [{id, relevance}]"
        )
    gold: dict[str, int] = {}
    for label in labels:
        if not isinstance(label, Mapping) or "id" not in label:
            raise RetrieverError(f"{place}: a label must be an object with an id, got {label!r:.100}")
        id_, grade = str(label["id"]), _first(label, _GRADES)
        relevance = 1 if grade is None else grade
        if isinstance(relevance, bool) or not isinstance(relevance, int | float) or relevance % 1 != 0:
            raise RetrieverError(
                f"{place}: the relevance of {id_!r} must be a whole number, got {grade!r:.50}"
            )
        if gold.setdefault(id_, int(relevance)) != relevance:
            raise RetrieverError(f"{place}: passage {id_!r} is judged twice, and not alike")
    return gold
