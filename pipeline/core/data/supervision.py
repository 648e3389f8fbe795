"""Gold reasoning steps for cold-start trajectories, from whatever supervision a question carries.

Every step comes out whole: a sub-query that can be asked as it stands, the evidence to write down, and the
passage in which it is found. Sources, best first:

1. a decomposition with evidence (the generated encyclopedia; 2WikiMultihopQA's triples): used as it is;
2. a decomposition without (MuSiQue): the evidence is the sentence of the gold passage that states the answer;
3. supporting passages alone (HotpotQA, NQ): one step per passage, its title is the query (the question itself
   if there is just one), the evidence is the sentence that leads to the next passage or to the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.core.records import Question
from pipeline.core.scoring.answers import contains_tokens, normalise_answer
from pipeline.core.sentences import split_sentences
from retriever_service.passages.corpus import Passage

PassageOf = Callable[[str], Passage | None]


@dataclass(frozen=True, slots=True)
class GoldStep:
    """One step of a gold trajectory. `answer` is what the next step, or the answer, needs of the evidence."""

    query: str
    evidence: str
    answer: str
    passage: Passage


class Unusable(ValueError):
    """A question cannot become a gold trajectory; the message is the reason, fit for counting."""


def is_supervised(question: Question) -> bool:
    """Whether a question names any supporting passage."""
    return bool(_supporting_ids(question))


def _supporting_ids(question: Question) -> tuple[str, ...]:
    hops = tuple(hop.supporting_id for hop in question.decomposition if hop.supporting_id)
    return question.supporting_ids or hops


def gold_steps(question: Question, passage_of: PassageOf, shown: Callable[[Passage], str]) -> list[GoldStep]:
    """The gold steps of a question, in the order in which they can be asked.

    Args:
        passage_of: passage of an id, None if the corpus does not have it.
        shown: the text of a passage as far as an agent gets to see it; evidence is only taken from there.

    Raises:
        Unusable: no supporting passage is named, or one is not in the corpus.
    """
    ids = _supporting_ids(question)
    if not ids:
        raise Unusable("no supporting passages")
    passages = [passage for id_ in ids if (passage := passage_of(id_)) is not None]
    if len(passages) < len(ids):
        raise Unusable("supporting passage not in the corpus")
    if question.decomposition:
        return _from_decomposition(question, passages, passage_of, shown)
    return _from_passages(question, passages, shown)


def _from_decomposition(
    question: Question, passages: Sequence[Passage], passage_of: PassageOf, shown: Callable[[Passage], str]
) -> list[GoldStep]:
    steps = []
    for hop in question.decomposition:
        passage = passage_of(hop.supporting_id) if hop.supporting_id else None
        if hop.supporting_id and passage is None:
            raise Unusable("supporting passage not in the corpus")
        if passage is None:
            passage = max(passages, key=lambda p: _match(f"{p.title} {p.text}", hop.answer, hop.question))
        evidence = hop.evidence or best_sentence(passage, shown(passage), hop.answer, hop.question)
        if not hop.evidence and not states(evidence, hop.answer):
            # What a reader of the passage concludes, though no sentence says it.
            evidence = f"{hop.question}{'' if hop.question.endswith('?') else ':'} {hop.answer}"
        steps.append(GoldStep(hop.question, evidence, hop.answer, passage))
    return steps


def _from_passages(
    question: Question, passages: Sequence[Passage], shown: Callable[[Passage], str]
) -> list[GoldStep]:
    """A passage that the question names comes first, one that states the answer last."""
    answer = question.answers[0]
    asked = normalise_answer(question.text).split()

    def order(passage: Passage) -> tuple[bool, bool, int]:
        title = normalise_answer(passage.title).split()
        overlap = len(set(normalise_answer(passage.text).split()) & set(asked))
        return not contains_tokens(asked, title), states(passage.text, answer), -overlap

    ordered = sorted(passages, key=order)
    leads_to = [passage.title for passage in ordered[1:]] + [answer]
    return [
        GoldStep(
            query=question.text if len(ordered) == 1 else passage.title or question.text,
            evidence=best_sentence(passage, shown(passage), wanted, question.text),
            answer=wanted,
            passage=passage,
        )
        for passage, wanted in zip(ordered, leads_to, strict=True)
    ]


def best_sentence(passage: Passage, text: str, wanted: str, query: str) -> str:
    """The sentence of `text` that states `wanted`, else the one that shares most words with `query`.

    The passage's title goes in front, as the agent sees it, if the sentence does not name it ("It was ...").
    """
    sentences = split_sentences(text) or [text]
    best = max(sentences, key=lambda sentence: _match(sentence, wanted, query))
    return best if not passage.title or states(best, passage.title) else f"{passage.title}: {best}"


def states(text: str, answer: str) -> bool:
    """True if the answer occurs in the text as a run of whole words."""
    return contains_tokens(normalise_answer(text).split(), normalise_answer(answer).split())


def _match(text: str, wanted: str, query: str) -> tuple[bool, int, int]:
    """How well a text fits: does it state `wanted`, shared words with it, shared words with the query."""
    tokens = set(normalise_answer(text).split())
    shared = [len(tokens & set(normalise_answer(other).split())) for other in (wanted, query)]
    return states(text, wanted), shared[0], shared[1]
