"""Questions from JSON Lines files, in the dialects of the usual multi-hop data sets.

Guarantees: a file is read whole or refused, with file, line and the way to mend it; nothing is skipped. Gold
decompositions come out resolved ("#1" replaced by the answer of the first hop), whatever the dialect.

One object per line:

    id, question            required (`_id` is accepted for `id`)
    answers | answer        required: a list of strings, or one; `golden_answers` (FlashRAG) is accepted
    type, hops              optional labels for the evaluation's break-down
    supporting_ids          optional: ids of the gold passages in the corpus
    decomposition           optional: [{question, answer, evidence?, supporting_id?}]; may use MuSiQue's
                            "X >> relation" and "#1"
    evidences               optional: [[subject, relation, object]] (2WikiMultihopQA)
    supporting_facts, context, paragraphs, output: evidence in the set's own terms, see `core.data.evidence`

Other fields are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.agents.program import derive_seed
from pipeline.core.data.evidence import read_evidence
from pipeline.core.errors import UserError
from pipeline.core.records import Hop, Question

_MUSIQUE_TYPE = re.compile(r"(\d+)hop")
_REFERENCE = re.compile(r"#(\d+)")
# Wikidata relations that read as a verb phrase behind their subject ("X educated at"), not as a noun.
_VERB_PHRASE = re.compile(
    r"^(applies|contains|crosses|educated|follows|has|licensed|located|named|owned|shares)\b"
    r"|\b(after|at|by|from|in|of|to|with)$"
)


def read_questions(
    paths: Sequence[str | Path],
    *,
    root: str | Path = "",
    limit: int | None = None,
    seed: int = 0,
    hops: Sequence[int] = (),
    with_evidence: bool = False,
) -> list[Question]:
    """All questions of the files, in their order.

    Args:
        root: folder that relative paths start from.
        limit: keep a uniform sample of this many (all if there are fewer). Which ones depends on the
            seed and the ids alone, not on the files' order; a larger limit keeps what a smaller one kept.
        hops: keep only questions of so many reasoning steps; empty: all.
        with_evidence: read `Question.evidence` too, which evaluation protocols need and which may be large.

    Raises:
        UserError: a file is missing or empty, a line is wrong, or no question is left; see the message.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    for given in paths:
        path = Path(root, given).expanduser()
        before = len(questions)
        for place, row in _rows(path):
            question = _question(row, place, with_evidence)
            if first := places.get(question.id):
                raise UserError(
                    f"{place}: id {question.id!r} was already used at {first}; give every question its own id"
                )
            places[question.id] = place
            questions.append(question)
        if len(questions) == before:
            raise UserError(f"{path} has no questions in it; expected one JSON object per line")
    if hops:
        questions = [question for question in questions if question.hops in hops]
        if not questions:
            raise UserError(
                f"data.hops is {list(hops)}, but no question of {', '.join(map(str, paths))} names so many hops; "
                "correct the key, or the field hops of the questions"
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


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, object) of every line that is not blank."""
    if not path.is_file():
        raise UserError(f"no question file {path}{_neighbours(path)}")
    with path.open(encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
                yield f"{path}:{number}", row
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not JSON ({error.msg}, column {error.colno}); expected one object per line"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 behind line {number}; save it as UTF-8") from error


def _neighbours(path: Path) -> str:
    """What is there instead of a missing file."""
    if path.is_dir():
        return f"; that is a directory, name a file in it{_listing(path)}"
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either (relative paths start at data.root)"
    return _listing(path.parent) or f"; {path.parent} has no .jsonl files"


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.jsonl"))
    return f"; there are {', '.join(names[:10])}" if names else ""


def _question(row: dict[str, Any], place: str, with_evidence: bool) -> Question:
    id_ = row.get("id", row.get("_id"))
    if not isinstance(id_, str | int) or not str(id_).strip():
        raise UserError(f"{place}: id is missing or empty; give every question an id")
    hops = _decomposition(row, place)
    return Question(
        id=str(id_),
        text=_text(row, "question", place),
        answers=_answers(row, place),
        type=str(row.get("type") or ""),
        hops=_num_hops(row, hops, place),
        supporting_ids=tuple(dict.fromkeys(_strings(row, "supporting_ids", place))),
        decomposition=hops,
        evidence=read_evidence(row, place) if with_evidence else None,
    )


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {key} must be a string that is not empty, got {value!r}")
    return value.strip()


def _strings(row: dict[str, Any], key: str, place: str) -> list[str]:
    value = row.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{place}: {key} must be a list of strings, got {value!r}")
    return value


def _answers(row: dict[str, Any], place: str) -> tuple[str, ...]:
    key = next((k for k in ("answers", "golden_answers", "answer") if k in row), None)
    if key is None:
        raise UserError(f"{place}: there is no answers (a list of strings) and no answer (a string)")
    values = [row[key]] if isinstance(row[key], str) else row[key]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f'{place}: {key} must be strings, got {row[key]!r}; put numbers in quotes ("1984")')
    answers = tuple(dict.fromkeys(value.strip() for value in values))
    if not answers or "" in answers:
        raise UserError(f"{place}: {key} has no answer or an empty one: {row[key]!r}")
    return answers


def _num_hops(row: dict[str, Any], hops: Sequence[Hop], place: str) -> int | None:
    if (given := row.get("hops")) is not None:
        if not isinstance(given, int) or isinstance(given, bool) or given < 0:
            raise UserError(f"{place}: hops must be a whole number, got {given!r}")
        return given
    if match := _MUSIQUE_TYPE.match(str(row.get("type") or "")):
        return int(match[1])
    return len(hops) or None


def _decomposition(row: dict[str, Any], place: str) -> tuple[Hop, ...]:
    if row.get("decomposition"):
        return _resolved_hops(row["decomposition"], place)
    return _hops_of_triples(row.get("evidences") or [], place)


def _resolved_hops(entries: Any, place: str) -> tuple[Hop, ...]:
    """Hops of {question, answer, ...} objects, references to earlier answers filled in."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{place}: decomposition must be a list of objects with question and answer")
    hops: list[Hop] = []
    for entry in entries:
        answers = [hop.answer for hop in hops]

        def earlier(match: re.Match[str], answers: list[str] = answers) -> str:
            number = int(match[1])  # "#1" in a first hop is no reference but text ("the #1 song of ...")
            return answers[number - 1] if 1 <= number <= len(answers) else match[0]

        where = f"{place}: decomposition[{len(hops)}]"
        subject, arrow, relation = (part.strip() for part in _text(entry, "question", where).partition(">>"))
        query = relation_query(subject, relation) if arrow and relation else f"{subject}{arrow}{relation}"
        hops.append(
            Hop(
                question=re.sub(r"\s+([?.!,])", r"\1", _REFERENCE.sub(earlier, query)),
                answer=_text(entry, "answer", where),
                evidence=str(entry.get("evidence") or ""),
                supporting_id=str(entry.get("supporting_id") or ""),
            )
        )
    return tuple(hops)


def _hops_of_triples(triples: Any, place: str) -> tuple[Hop, ...]:
    """Hops of [subject, relation, object]; several objects of one subject and relation make one hop."""
    objects: dict[tuple[str, str], list[str]] = {}
    for triple in triples:
        if not isinstance(triple, list) or len(triple) != 3 or not all(isinstance(t, str) for t in triple):
            raise UserError(f"{place}: evidences must be [subject, relation, object] triples, got {triple!r}")
        subject, relation, object_ = (t.strip() for t in triple)
        objects.setdefault((subject, relation), []).append(object_)
    return tuple(
        Hop(
            question=relation_query(subject, relation),
            answer=", ".join(values),
            evidence=_relation_statement(subject, relation, ", ".join(values)),
        )
        for (subject, relation), values in objects.items()
    )


def relation_query(subject: str, relation: str) -> str:
    """A search query for a knowledge-base relation: "director of Bloody Moon", "Ada educated at"."""
    return f"{subject} {relation}" if _VERB_PHRASE.search(relation) else f"{relation} of {subject}"


def _relation_statement(subject: str, relation: str, object_: str) -> str:
    verb_phrase = _VERB_PHRASE.search(relation)
    return f"{subject} {relation} {object_}." if verb_phrase else f"The {relation} of {subject} is {object_}."
