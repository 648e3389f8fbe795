"""What a trajectory says in the terms of its data set: the answer, and the evidence that it wrote down.

A record is cut into sentences. Each sentence comes from the passage of its own step that has the largest share of its
words, if that is half of them or more, and there from the sentence with the largest share; of equals the first. Where
the agent selected passages only these are looked at, in its order. The words of the passage's title count only where
there are no others. So:

    facts        (title, number) of these sentences. Where the question's own row has the passage, by its id or else its
                 title, they are counted in the sentences of the row; elsewhere in the passage, cut by punctuation
    paragraphs   places of these passages in the question's own row, as far as it has them
    pages        `wikipedia_id` of their metadata, else their ids: first these in their order, then all others that were
                 found, in the order in which they were found

Without a record no evidence is named; triples never are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.core.records import Evidence, Paragraph, Question, Trajectory
from pipeline.core.scoring.answers import normalise_answer
from pipeline.core.scoring.prediction import Fact, Prediction
from pipeline.core.sentences import split_sentences
from retriever_service.passages.corpus import Passage, passage_text

Words = frozenset[str]


def predict(question: Question, trajectory: Trajectory) -> Prediction:
    """The prediction that a trajectory makes; one that ended without an answer has none."""
    context = (question.evidence or Evidence()).context
    used = list(_sources(trajectory))
    places = [_place(passage, context) for _, passage in used]
    facts = [
        _fact(said, passage, None if place is None else context[place])
        for (said, passage), place in zip(used, places, strict=True)
    ]
    found = [passage for _, passage in used]
    found += [hit.passage for step in trajectory.steps for hit in step.hits]
    return Prediction(
        answer=trajectory.answer or None,
        facts=frozenset(facts),
        paragraphs=frozenset(place for place in places if place is not None),
        pages=tuple(dict.fromkeys(_page(passage) for passage in found)),
    )


def _sources(trajectory: Trajectory) -> Iterator[tuple[Words, Passage]]:
    """(words of a recorded sentence, the passage that it comes from), in the order in which they were written."""
    for step in trajectory.steps:
        passages = [hit.passage for hit in step.used_hits]
        for sentence in split_sentences(step.record):
            said = _words(sentence)
            shares = [_share(said, passage_text(passage)) for passage in passages]
            if shares and max(shares) >= 0.5:
                yield said, passages[shares.index(max(shares))]


def _place(passage: Passage, context: Sequence[Paragraph]) -> int | None:
    """Where a passage is in a question's own row; of paragraphs with its title, the one that is most like it."""
    for place, paragraph in enumerate(context):
        if paragraph.id and paragraph.id == passage.id:
            return place
    title = passage.title.casefold()
    named = [place for place, p in enumerate(context) if p.title and p.title.casefold() == title]
    words = _words(passage.text)
    return max(named, key=lambda place: _share(words, context[place].text), default=None)


def _fact(said: Words, passage: Passage, paragraph: Paragraph | None) -> Fact:
    title, sentences = passage.title, tuple(split_sentences(passage.text))
    if paragraph is not None and paragraph.sentences:
        title, sentences = paragraph.title or title, paragraph.sentences
    beside_title = said - _words(title) or said
    shares = [_share(beside_title, sentence) for sentence in sentences]
    return title, shares.index(max(shares)) if shares else 0


def _page(passage: Passage) -> str:
    return str(passage.metadata.get("wikipedia_id", passage.id))


def _share(words: Words, text: str) -> float:
    """Share of the words that occur in the text."""
    return len(words & _words(text)) / len(words) if words else 0.0


def _words(text: str) -> Words:
    return frozenset(normalise_answer(text).split())
