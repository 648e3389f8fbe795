"""Scores of fixed predictions before and after answers had a protocol of our own, and intervals Wilson's.

python -m bench.metrics [--root DIR] FILE.jsonl [FILE.jsonl ...]

Predictions are made of a question's gold answer or gold passages by the rules of `RULES`, so that they are the same
everywhere; `corpus.jsonl` is beside each file of questions. Prints a table in Markdown: what moved,
by how much and why.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.data.questions import read_questions
from pipeline.core.records import Question
from pipeline.core.scoring.answers import RULES as PROTOCOLS
from pipeline.core.scoring.answers import contains_tokens, score_answer
from pipeline.core.scoring.intervals import wilson
from pipeline.core.sentences import split_sentences
from retriever_service.passages.corpus import Passage, read_corpus

Scores = tuple[float, float, float]
"""EM, F1, accuracy."""
METRICS = ("EM", "F1", "accuracy")
TYPED_OTHERWISE = str.maketrans({"'": "\u2019", "-": "\u2013", '"': "\u201d"})

RULES: Mapping[str, Callable[[Question, Passage], str]] = {
    "gold": lambda question, passage: question.answers[0],
    "gold, typed otherwise": lambda question, passage: typed_otherwise(question.answers[0]),
    "sentence with the gold": lambda question, passage: f"There is no doubt: {question.answers[0]}.",
    "always no": lambda question, passage: "no",
    "title of the last gold passage": lambda question, passage: passage.title,
    "its first sentence": lambda question, passage: (split_sentences(passage.text) or [""])[0],
}


def typed_otherwise(text: str) -> str:
    """The same to a reader: letters decomposed, curly quotation marks, dashes."""
    return unicodedata.normalize("NFD", text.translate(TYPED_OTHERWISE))


@dataclass(frozen=True, slots=True)
class Row:
    """One rule on one set: the scores [questions, 3] before and after, and the reason of each question that moved."""

    before: np.ndarray
    after: np.ndarray
    moved: Counter[str]

    def cells(self) -> list[str]:
        pairs = zip(100 * self.before.mean(axis=0), 100 * self.after.mean(axis=0), strict=True)
        scores = [f"{b:.1f}" if f"{b:.1f}" == f"{a:.1f}" else f"{b:.1f} to {a:.1f}" for b, a in pairs]
        intervals = [bootstrap_alone(self.before[:, 0]), wilson(int(self.after[:, 0].sum()), len(self.after))]
        shown = [f"{100 * low:.1f}-{100 * high:.1f}" for low, high in intervals]
        return [*scores, *shown, ", ".join(f"{why} {count}" for why, count in sorted(self.moved.items()))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder that the files are in")
    parser.add_argument("files", type=Path, nargs="+", help="questions with supporting_ids")
    arguments = parser.parse_args()
    print("| set | predictions | " + " | ".join(METRICS) + " | 95 % of EM before | after | moved |")
    print("|" + "---|" * 8)
    for file in arguments.files:
        questions = read_questions([file], root=arguments.root)
        passages = last_gold_passages(questions, arguments.root / file.parent / "corpus.jsonl")
        for name, rule in RULES.items():
            row = compared(questions, [rule(q, p) for q, p in zip(questions, passages, strict=True)])
            print(f"| {file.parent.name} ({len(questions)}) | {name} | {' | '.join(row.cells())} |")


def last_gold_passages(questions: Sequence[Question], corpus: Path) -> list[Passage]:
    """The last supporting passage of each question."""
    wanted = {question.supporting_ids[-1] for question in questions}
    found = {passage.id: passage for passage in read_corpus([str(corpus)]) if passage.id in wanted}
    return [found[question.supporting_ids[-1]] for question in questions]


def compared(questions: Sequence[Question], predictions: Sequence[str]) -> Row:
    """Both scores of every prediction."""
    before, after, moved = [], [], Counter[str]()
    for question, prediction in zip(questions, predictions, strict=True):
        now = score_answer(prediction, question.answers)
        before.append(score_before(prediction, question.answers))
        after.append((now.em, now.f1, now.accuracy))
        if not np.allclose(before[-1], after[-1]):
            moved[reason(prediction, question.answers)] += 1
    return Row(np.array(before), np.array(after), moved)


def score_before(prediction: str, golds: Sequence[str]) -> Scores:
    """KILT's EM and F1, and accuracy over any run of words, yes and no among them."""
    score, normalise = score_answer(prediction, golds, "kilt"), PROTOCOLS["kilt"].normalise
    words = normalise(prediction).split()
    return score.em, score.f1, float(any(contains_tokens(words, normalise(gold).split()) for gold in golds))


def reason(prediction: str, golds: Sequence[str]) -> str:
    """Why a score moved: yes and no are whole answers, or writing that only looks different."""
    said = {PROTOCOLS["kilt"].normalise(text) for text in (prediction, *golds)}
    return "yes, no" if said & {"yes", "no", "noanswer"} else "writing"


def bootstrap_alone(scores: np.ndarray) -> tuple[float, float]:
    """The interval as it was: percentiles of resampled means."""
    rng, n = np.random.default_rng(0), len(scores)
    low, high = np.percentile([scores[rng.integers(0, n, n)].mean() for _ in range(1000)], [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
