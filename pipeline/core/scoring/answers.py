"""How good an answer is, by the rules of a protocol.

A protocol says how answers are brought into one form before they are compared, and what equal words are worth. All take
the best over the gold answers, metric by metric. The default, `exsearch`, guarantees:

- on ASCII text it compares as KILT and SQuAD do: lower case, no punctuation, no English articles, single spaces;
- beyond ASCII, what only looks different is the same: composed and decomposed letters, curly and straight apostrophes,
  dashes and hyphens, full-width letters, invisible characters. Accents and the articles of other languages stay;
- yes, no and noanswer are whole answers: they are equal to the other one or worth nothing;
- a gold answer of nothing but articles or punctuation is matched by itself alone, never by nothing.

The others are what the official scripts do, to the letter. Sources: SQuAD `evaluate-v1.1.py`, KILT
`eval_downstream.py`, HotpotQA `hotpot_evaluate_v1.py`, 2WikiMultihopQA `2wikimultihop_evaluate_v1.1.py`, MuSiQue
`metrics/answer.py`, TriviaQA `triviaqa_evaluation.py`, NQ-open (ORQA) `eval_utils.py`. Bamboogle has no script; it is
scored as SQuAD is. Accuracy is "cover-EM", which none of them has: the gold answer occurs in the prediction as a run of
whole words.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal[
    "exsearch", "kilt", "hotpotqa", "2wikimultihopqa", "musique", "nq", "triviaqa", "bamboogle"
]
METRICS: Mapping[str, str] = {"em": "EM", "f1": "F1", "accuracy": "accuracy"}
"""Of an answer, as `AnswerScore` has them, and what they are called."""

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TRIVIAQA_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WHOLE = ("yes", "no", "noanswer")
# Letters and signs of mathematics that are typed for an apostrophe, a hyphen, a slash, a colon or a tilde.
_LOOK_ALIKES = frozenset("\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\ua78c\u2212\u2044\u2215\u2236\u223c")


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Exact match, token F1 with its precision and recall, and accuracy (cover-EM), each in [0, 1]."""

    em: float
    f1: float
    accuracy: float
    precision: float
    recall: float


RIGHT = AnswerScore(1.0, 1.0, 1.0, 1.0, 1.0)
WRONG = AnswerScore(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """The part of a protocol that looks at answers.

    `whole_words`: F1 of yes, no and noanswer is 0 unless both sides are equal. `blank_f1`: F1 of two answers that are
    nothing when normalised. `guarded`: what normalises to nothing is compared in a fuller form, and must be equal.
    """

    normalise: Callable[[str], str]
    whole_words: bool = False
    blank_f1: float = 0.0
    guarded: bool = False


def score_answer(prediction: str, golds: Iterable[str], protocol: ProtocolName = "exsearch") -> AnswerScore:
    """Scores of a prediction, each the best over the gold answers. Without gold answers: 0."""
    rules = RULES[protocol]
    scores = [_score_one(prediction, gold, rules) for gold in golds]
    return AnswerScore(
        em=max((s.em for s in scores), default=0.0),
        f1=max((s.f1 for s in scores), default=0.0),
        accuracy=max((s.accuracy for s in scores), default=0.0),
        precision=max((s.precision for s in scores), default=0.0),
        recall=max((s.recall for s in scores), default=0.0),
    )


def normalise_answer(text: str) -> str:
    """The form in which the default protocol compares answers."""
    return RULES["exsearch"].normalise(text)


def contains_tokens(tokens: Sequence[str], wanted: Sequence[str]) -> bool:
    """True if `wanted` (not empty) is a contiguous run of `tokens`."""
    n = len(wanted)
    return n > 0 and any(tokens[i : i + n] == wanted for i in range(len(tokens) - n + 1))


def _score_one(prediction: str, gold: str, rules: AnswerRules) -> AnswerScore:
    predicted, wanted = rules.normalise(prediction), rules.normalise(gold)
    if not wanted and rules.guarded:
        return RIGHT if _equal_as_they_stand(prediction, gold) else WRONG
    if predicted == wanted:
        words = 1.0 if wanted else rules.blank_f1
        return AnswerScore(em=1.0, f1=words, accuracy=1.0, precision=words, recall=words)
    if rules.whole_words and (predicted in _WHOLE or wanted in _WHOLE):
        return WRONG
    tokens, gold_tokens = predicted.split(), wanted.split()
    common = (Counter(tokens) & Counter(gold_tokens)).total()
    return AnswerScore(
        em=0.0,
        f1=2 * common / (len(tokens) + len(gold_tokens)),
        accuracy=float(wanted not in _WHOLE and contains_tokens(tokens, gold_tokens)),
        precision=common / len(tokens) if tokens else 0.0,
        recall=common / len(gold_tokens) if gold_tokens else 0.0,
    )


def _equal_as_they_stand(prediction: str, gold: str) -> bool:
    """Whether two answers are equal with their articles ("The The"), or with their punctuation too ("!!!")."""
    for form in (_without_marks, _unified):
        if wanted := form(gold).split():
            return form(prediction).split() == wanted
    return False


def _squad(text: str) -> str:
    """Lower case without ASCII punctuation, articles and extra white space (SQuAD, KILT, HotpotQA, 2Wiki, MuSiQue)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


def _triviaqa(text: str) -> str:
    """Punctuation, four kinds of quotation marks too, becomes a space; the rest as SQuAD."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_TRIVIAQA_PUNCTUATION)).split())


def _nq(text: str) -> str:
    """Accents are taken off their letters first, so that both ways to write them are equal; the rest as SQuAD."""
    return _squad(unicodedata.normalize("NFD", text))


def _own(text: str) -> str:
    if text.isascii():
        return _squad(text)
    # Word by word: next to a combining mark, `\b` sees the end of a word within a letter.
    return " ".join(word for word in _without_marks(text).split() if word not in ("a", "an", "the"))


def _without_marks(text: str) -> str:
    """Unified text without the punctuation of any script."""
    # Before as well: the compatible form of an accent that stands alone is a space and a combining mark.
    return _without_punctuation(_unified(_without_punctuation(text)))


def _without_punctuation(text: str) -> str:
    return "".join(char for char in text if not _is_punctuation(char))


def _is_punctuation(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] == "P" or category == "Sk" or char in string.punctuation or char in _LOOK_ALIKES


def _unified(text: str) -> str:
    """One form of letters that are equivalent or compatible, in lower case, without invisible characters."""
    visible = "".join(char for char in text if not _is_invisible(char))
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) == "Cf" or "\ufe00" <= char <= "\ufe0f"  # variation selectors


RULES: Mapping[ProtocolName, AnswerRules] = {
    "exsearch": AnswerRules(_own, whole_words=True, guarded=True),
    "kilt": AnswerRules(_squad),
    "hotpotqa": AnswerRules(_squad, whole_words=True),
    "2wikimultihopqa": AnswerRules(_squad, whole_words=True),
    "musique": AnswerRules(_squad, blank_f1=1.0),
    "nq": AnswerRules(_nq),
    "triviaqa": AnswerRules(_triviaqa),
    "bamboogle": AnswerRules(_squad),
}
