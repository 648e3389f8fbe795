"""How good rankings are: judgements, questions and runs from files, measures by ir_measures.

Guarantees:
- measures look at the order that a run has; where scores are equal, trec_eval would make its own;
- a judged question that the run does not answer, or that has no relevant passage, counts as 0;
- a question that is itself a passage (ArguAna, Quora) does not find itself: a passage with the question's id is left
  out of its answer, as BEIR does (`ignore_identical_ids`), unless it is judged relevant;
- a mistake in a file is a `RetrieverError` that names file and line: nothing is repaired or skipped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from retriever_service.choices import DEFAULT_KS
from retriever_service.errors import RetrieverError
from retriever_service.files import writing
from retriever_service.passages.records import open_records, read_lines

Qrels = dict[str, dict[str, int]]
"""Relevance by question id and passage id; above 0 is relevant."""
Run = dict[str, list[tuple[str, float]]]
"""(passage id, score) by question id, best first."""

Measure = Literal["ndcg", "recall", "mrr", "all_gold", "precision"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEFAULT_MEASURES: tuple[Measure, ...] = ("ndcg", "recall", "mrr", "all_gold")

_NAME_IN_LIBRARY = {"ndcg": "nDCG", "recall": "R", "mrr": "RR", "all_gold": "R", "precision": "P"}
_BEIR_HEADER = ["query-id", "corpus-id", "score"]


def evaluate_run(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Sequence[tuple[str, float]]],
    measures: Sequence[Measure] = DEFAULT_MEASURES,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float]:
    """Every measure at every k, its mean over all judged questions: `{"ndcg@10": 0.677, ...}`, as fractions.

    See `score_questions`.
    """
    scored = score_questions(qrels, run, measures, ks)
    names = next(iter(scored.values()))
    return {name: float(np.mean([scores[name] for scores in scored.values()])) for name in names}


def score_questions(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Sequence[tuple[str, float]]],
    measures: Sequence[Measure] = DEFAULT_MEASURES,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, dict[str, float]]:
    """Every measure at every k of each judged question, as fractions, by question and then `ndcg@10`.

    `ndcg`: gains are the judgements themselves (linear), over log2(rank + 1); `precision`: relevant ones among the
    first k, over k; `recall`: of the relevant passages; `mrr`: 1 / rank of the first relevant one; `all_gold`: 1 where
    all relevant passages are among the first k, else 0 (ToolRet's completeness).

    Raises:
        RetrieverError: nothing is judged, the run answers questions that are not, a passage comes twice in an
            answer, or there is no such measure.
    """
    import ir_measures

    wanted = {}
    for name in measures:
        if name not in MEASURES:
            raise RetrieverError(f"there is no measure {name!r}; known are {', '.join(MEASURES)}")
        for k in ks:
            if k < 1:
                raise RetrieverError(f"measures look at the first k passages, k at least 1, got {k}")
            wanted[f"{name}@{k}"] = getattr(ir_measures, _NAME_IN_LIBRARY[name]) @ k
    _check_judged(qrels, run)
    values: defaultdict[str, dict[Any, float]] = defaultdict(dict)
    for result in ir_measures.iter_calc(
        set(wanted.values()),
        {question: dict(judged) for question, judged in qrels.items()},
        {question: _by_place(question, answer, qrels[question]) for question, answer in run.items()},
    ):
        values[result.query_id][result.measure] = float(result.value)
    return {
        question: {
            key: float(values[question][measure] == 1)
            if key.startswith("all_gold")
            else values[question][measure]
            for key, measure in wanted.items()
        }
        for question in qrels
    }


def _check_judged(qrels: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    if not qrels:
        raise RetrieverError("there are no judged questions to evaluate on")
    strange = [question for question in run if question not in qrels]
    if strange:
        raise RetrieverError(
            f"{len(strange)} of the {len(run)} questions of the run are not judged, the first is {strange[0]!r}; "
            "evaluate with their judgements, or leave them out"
        )


def _by_place(
    question: str, answer: Sequence[tuple[str, float]], judged: Mapping[str, int]
) -> dict[str, float]:
    """Scores that no measure can take for equal, in the order of the answer; without the question itself."""
    scores = {passage: float(len(answer) - place) for place, (passage, _) in enumerate(answer)}
    if len(scores) < len(answer):
        raise RetrieverError(f"question {question!r}: a passage comes twice in the answer")
    if judged.get(question, 0) <= 0:
        scores.pop(question, None)
    return scores


def read_qrels(path: str | Path) -> Qrels:
    """Judgements as BEIR has them (tab-separated, with a header) or as TREC does (question, 0, passage, relevance).

    One that comes again is read once.

    Raises:
        RetrieverError: no such file, no judgements, a malformed line, or judgements that contradict each other.
    """
    qrels: Qrels = {}
    is_beir: bool | None = None
    for where, line in _lines(path):
        if is_beir is None:
            is_beir = line.split("\t") == _BEIR_HEADER
            if is_beir:
                continue
        fields = line.split("\t") if is_beir else line.split()
        if len(fields) != (3 if is_beir else 4):
            raise RetrieverError(
                f"{where}: expected {'<tab>'.join(_BEIR_HEADER)} below a header that says so (BEIR), or question, 0, "
                f"passage and relevance (TREC), got {line!r:.200}"
            )
        question, passage = fields[0], fields[-2]
        relevance = int(_number(fields[-1], int, "relevance", where))
        before = qrels.setdefault(question, {}).setdefault(passage, relevance)
        if before != relevance:
            raise RetrieverError(
                f"{where}: passage {passage!r} was judged {before} for question {question!r} before, now {relevance}"
            )
    if not qrels:
        raise RetrieverError(f"{path}: no judgements")
    return qrels


def read_queries(path: str | Path) -> dict[str, str]:
    """Text by id, in the order of a file of records (`open_records`): `{"_id", "text"}` or `{"id", "question"}`.

    Raises:
        RetrieverError: no such file, no questions, or a malformed line.
    """
    queries: dict[str, str] = {}
    records = open_records(path)
    for number, record in records:
        place = records.place(number)
        id_ = record.get("_id", record.get("id"))
        id_ = str(id_) if isinstance(id_, int) and not isinstance(id_, bool) else id_
        text = record.get("text", record.get("question"))
        if not isinstance(id_, str) or not isinstance(text, str) or not id_ or not text.strip():
            raise RetrieverError(
                f"{place}: a question needs an id ('_id' or 'id') and a text ('text' or 'question'), both "
                f"not empty (fields: {', '.join(sorted(record))[:200] or 'none'})"
            )
        if id_ in queries:
            raise RetrieverError(f"{place}: question {id_!r} appears twice; give every question its own id")
        queries[id_] = text
    if not queries:
        raise RetrieverError(f"{path}: no questions")
    return queries


def read_run(path: str | Path) -> Run:
    """A run in TREC's format: question, Q0, passage, rank, score, tag. Best score first, equal ones by rank.

    Raises:
        RetrieverError: no such file, no rankings, or a malformed line.
    """
    answers: defaultdict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for where, line in _lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise RetrieverError(
                f"{where}: expected question, Q0, passage, rank, score and tag, got {line!r:.200}"
            )
        question, _, passage, rank, score, _ = fields
        if passage in answers[question]:
            raise RetrieverError(f"{where}: passage {passage!r} comes twice for question {question!r}")
        answers[question][passage] = -_number(score, float, "score", where), _number(rank, int, "rank", where)
    if not answers:
        raise RetrieverError(f"{path}: no rankings")
    return {
        question: [(passage, -key[0]) for passage, key in sorted(found.items(), key=lambda item: item[1])]
        for question, found in answers.items()
    }


def write_run(run: Mapping[str, Sequence[tuple[str, float]]], path: str | Path, tag: str) -> None:
    """Write a run in TREC's format, whole or not at all.

    A score that is not below the one before is written just below it: tools that order by score then see the order
    of the run.

    Raises:
        RetrieverError: an id, or the tag, is empty or has white space, which the format has no place for.
    """
    with writing(Path(path)) as file:
        for question, answer in run.items():
            previous = np.float32(np.inf)
            for rank, (passage, score) in enumerate(answer, start=1):
                for name in (question, passage, tag):
                    if name.split() != [name]:
                        raise RetrieverError(
                            f"{path}: {name!r} cannot stand in a TREC run: white space, or empty"
                        )
                previous = min(np.float32(score), np.nextafter(previous, np.float32(-np.inf)))
                file.write(f"{question} Q0 {passage} {rank} {previous:.9g} {tag}\n".encode())


def _number(text: str, kind: type[int] | type[float], what: str, where: str) -> float:
    try:
        number = kind(text)
        if math.isfinite(number):
            return number
    except (ValueError, OverflowError):
        pass
    raise RetrieverError(f"{where}: the {what} must be a {'whole ' * (kind is int)}number, got {text!r}")


def _lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of every line that is not blank."""
    _check_is_file(path)
    for number, line in read_lines(Path(path)):
        yield f"{path}:{number}", line


def _check_is_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise RetrieverError(f"{path} does not exist")
