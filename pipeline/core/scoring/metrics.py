"""The metrics of one question as its data set defines them, each in [0, 1], under the official scripts' names.

Guarantees: what a prediction does not say counts 0; a metric is left out where the question's row has nothing to
compare with, or where `parts` says that no prediction has this part. Sources: HotpotQA `hotpot_evaluate_v1.py`,
2WikiMultihopQA `2wikimultihop_evaluate_v1.1.py`, MuSiQue `evaluate_v1.0.py` (answerable questions), KILT
`eval_downstream.py` and `eval_retrieval.py` (without ROUGE-L and recall@5).
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.records import Evidence, Question
from pipeline.core.scoring.answers import AnswerScore, ProtocolName, score_answer
from pipeline.core.scoring.prediction import Fact, Prediction, Triple

Metrics = dict[str, float]
Score = Callable[[Question, Prediction, Collection[str]], Metrics]
"""The metrics of a question's prediction, given which parts of `EVIDENCE` are said by any prediction at all."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Part:
    """How one part of a prediction (the answer, the supporting facts) agrees with the gold one."""

    em: float = 0.0
    f1: float = 0.0
    precision: float = 0.0
    recall: float = 0.0

    def named(self, prefix: str) -> Metrics:
        names = ("em", "f1", "prec", "recall")
        values = (self.em, self.f1, self.precision, self.recall)
        return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


def answers_only(protocol: ProtocolName) -> Score:
    """EM, F1 and accuracy by a protocol's rules."""

    def score(question: Question, prediction: Prediction, parts: Collection[str]) -> Metrics:
        found = _answer(question, prediction, protocol)
        return {"em": found.em, "f1": found.f1, "accuracy": found.accuracy}

    return score


def hotpotqa(question: Question, prediction: Prediction, parts: Collection[str]) -> Metrics:
    """em, f1, prec, recall of the answer; the same of the supporting facts (sp_) and of both at once (joint_)."""
    answer = _as_part(_answer(question, prediction, "hotpotqa"))
    metrics = answer.named("")
    gold = _evidence(question).supporting_facts
    if gold and "facts" in parts:
        facts = Part() if prediction.facts is None else _overlap(prediction.facts, set(gold))
        metrics |= facts.named("sp_") | _joint(answer, facts).named("joint_")
    return metrics


def two_wiki(question: Question, prediction: Prediction, parts: Collection[str]) -> Metrics:
    """As `hotpotqa`, titles in any case; and the evidence triples (evi_), which joint_ then has in it as well.

    As in the official script two predicted triples may match one gold triple, under different names of its entities:
    then evi_recall is above 1.
    """
    answer, evidence = _as_part(_answer(question, prediction, "2wikimultihopqa")), _evidence(question)
    metrics = answer.named("")
    facts = triples = None
    if evidence.supporting_facts and "facts" in parts:
        gold, said = _in_any_case(set(evidence.supporting_facts)), prediction.facts
        facts = Part() if said is None else _overlap(_in_any_case(said), gold)
        metrics |= facts.named("sp_")
    if evidence.triples and "triples" in parts:
        triples = Part() if prediction.triples is None else _agreement(prediction.triples, evidence)
        metrics |= triples.named("evi_")
    if facts and triples:
        metrics |= _joint(answer, facts, triples).named("joint_")
    return metrics


def musique(question: Question, prediction: Prediction, parts: Collection[str]) -> Metrics:
    """answer_em and answer_f1 over all names of the answer; support_f1 of the paragraphs."""
    answer, evidence = _answer(question, prediction, "musique"), _evidence(question)
    metrics = {"answer_em": answer.em, "answer_f1": answer.f1}
    if evidence.context and "paragraphs" in parts:
        said, gold = prediction.paragraphs, set(evidence.supporting_paragraphs)
        neither = said is not None and not said and not gold
        metrics["support_f1"] = 1.0 if neither else _overlap(said or set(), gold).f1
    return metrics


def kilt(question: Question, prediction: Prediction, parts: Collection[str]) -> Metrics:
    """em and f1; Rprec, the best R-precision over the gold sets of pages; KILT-em and KILT-f1, which count where Rprec
    is 1."""
    answer = _answer(question, prediction, "kilt")
    metrics = {"em": answer.em, "f1": answer.f1}
    gold = _evidence(question).provenance
    if any(gold) and "pages" in parts:
        precision = max(_r_precision(prediction.pages or (), pages) for pages in gold)
        complete = float(precision == 1.0)
        metrics |= {"Rprec": precision, "KILT-em": complete * answer.em, "KILT-f1": complete * answer.f1}
    return metrics


SCORES: Mapping[ProtocolName, Score] = {
    "exsearch": answers_only("exsearch"),
    "kilt": kilt,
    "hotpotqa": hotpotqa,
    "2wikimultihopqa": two_wiki,
    "musique": musique,
    "nq": answers_only("nq"),
    "triviaqa": answers_only("triviaqa"),
    "bamboogle": answers_only("bamboogle"),
}


def _answer(question: Question, prediction: Prediction, protocol: ProtocolName) -> AnswerScore:
    if prediction.answer is None:
        return score_answer("", ())
    return score_answer(prediction.answer, question.answers, protocol)


def _as_part(score: AnswerScore) -> Part:
    return Part(score.em, score.f1, score.precision, score.recall)


def _evidence(question: Question) -> Evidence:
    return question.evidence or Evidence()


def _in_any_case(facts: Collection[Fact]) -> list[Fact]:
    """Titles in lower case; two that only differ in case stay two, as in the official script."""
    return [(title.lower(), number) for title, number in facts]


def _overlap(said: Collection[object], gold: Collection[object]) -> Part:
    """Of two sets; those without an element agree, though they share none."""
    right = sum(one in gold for one in said)
    missed = sum(one not in said for one in gold)
    return _part(right, len(said), right + missed, em=right == len(said) and not missed)


def _agreement(said: Sequence[Triple], evidence: Evidence) -> Part:
    """Of predicted triples with gold ones, whose subject and object may go by any of their names."""
    predicted = {_plain_triple(triple) for triple in said}
    gold = [_names_of(triple, evidence.aliases) for triple in evidence.triples]
    matched = sum(any(triple in names for names in gold) for triple in predicted)
    return _part(matched, len(predicted), len(gold), em=matched == len(predicted) == len(gold))


def _names_of(triple: Triple, aliases: Mapping[str, Sequence[str]]) -> set[Triple]:
    subject, relation, object_ = triple
    return {
        _plain_triple((s, relation, o))
        for s in (subject, *aliases.get(subject, ()))
        for o in (object_, *aliases.get(object_, ()))
    }


def _plain_triple(triple: Triple) -> Triple:
    """Lower case without punctuation; articles stay."""
    subject, relation, object_ = (" ".join(t.lower().translate(_PUNCTUATION).split()) for t in triple)
    return subject, relation, object_


def _part(shared: int, said: int, gold: int, em: bool) -> Part:
    precision, recall = shared / said if said else 0.0, shared / gold if gold else 0.0
    return Part(float(em), _harmonic(precision, recall), precision, recall)


def _joint(*parts: Part) -> Part:
    precision, recall = (math.prod(p.precision for p in parts), math.prod(p.recall for p in parts))
    return Part(math.prod(p.em for p in parts), _harmonic(precision, recall), precision, recall)


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _r_precision(said: Sequence[str], gold: Sequence[str]) -> float:
    """Share of gold pages among as many pages from the front, each page once."""
    wanted = {page.strip() for page in gold}
    first = list(dict.fromkeys(page.strip() for page in said))[: len(wanted)]
    return sum(page in wanted for page in first) / len(wanted) if wanted else 0.0
