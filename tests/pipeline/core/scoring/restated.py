"""The published definitions of answer metrics, said again as plainly as possible, without code of the project."""

# ruff: noqa: RUF001, RUF002  (other writing than ASCII is what this is about)

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from pipeline.core.scoring.answers import ProtocolName

ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"

Normal = Callable[[str], str]


def squad_normal(text: str) -> str:
    """Lower case; ASCII punctuation deleted; a, an, the deleted where no letter, digit or underscore touches them."""
    letters = [char for char in text.lower() if char not in ASCII_PUNCTUATION]
    return " ".join(without_articles("".join(letters)).split())


def without_articles(text: str) -> str:
    result, word = "", ""
    for char in [*text, ""]:
        if char and (char.isalnum() or char == "_"):
            word += char
        else:
            result += " " if word in ("a", "an", "the") else word
            result += char
            word = ""
    return result


def nq_normal(text: str) -> str:
    return squad_normal(unicodedata.normalize("NFD", text))


def triviaqa_normal(text: str) -> str:
    """Punctuation and ‘ ’ ´ become a space each; the rest as above."""
    letters = [" " if char in ASCII_PUNCTUATION + "‘’´" else char for char in text.lower()]
    return " ".join(without_articles("".join(letters)).split())


def overlap(prediction: Sequence[str], gold: Sequence[str]) -> tuple[float, float, float]:
    """(F1, precision, recall) of two bags of words; zeros where they share none."""
    left, shared = list(gold), 0
    for word in prediction:
        if word in left:
            left.remove(word)
            shared += 1
    if shared == 0:
        return 0.0, 0.0, 0.0
    precision, recall = shared / len(prediction), shared / len(gold)
    return 2 * precision * recall / (precision + recall), precision, recall


def squad_pair(
    prediction: str, gold: str, normal: Normal = squad_normal
) -> tuple[float, float, float, float]:
    """(EM, F1, precision, recall) of SQuAD and KILT."""
    a, b = normal(prediction), normal(gold)
    return (float(a == b), *overlap(a.split(), b.split()))


def hotpotqa_pair(prediction: str, gold: str) -> tuple[float, float, float, float]:
    """As SQuAD; where one side is yes, no or noanswer and the other is not the same, all is 0."""
    a, b = squad_normal(prediction), squad_normal(gold)
    if a != b and (a in ("yes", "no", "noanswer") or b in ("yes", "no", "noanswer")):
        return 0.0, 0.0, 0.0, 0.0
    return squad_pair(prediction, gold)


def musique_pair(prediction: str, gold: str) -> tuple[float, float, float, float]:
    """As SQuAD 2: two answers without a word agree."""
    if squad_normal(prediction) == squad_normal(gold) == "":
        return 1.0, 1.0, 1.0, 1.0
    return squad_pair(prediction, gold)


PAIRS: dict[ProtocolName, Callable[[str, str], tuple[float, float, float, float]]] = {
    "kilt": squad_pair,
    "bamboogle": squad_pair,
    "hotpotqa": hotpotqa_pair,
    "2wikimultihopqa": hotpotqa_pair,
    "musique": musique_pair,
    "nq": lambda prediction, gold: squad_pair(prediction, gold, nq_normal),
    "triviaqa": lambda prediction, gold: squad_pair(prediction, gold, triviaqa_normal),
}


def best(protocol: ProtocolName, prediction: str, golds: Sequence[str]) -> tuple[float, float, float, float]:
    """(EM, F1, precision, recall), each the best over the gold answers."""
    rows = [PAIRS[protocol](prediction, gold) for gold in golds]
    em, f1, precision, recall = (max(column) for column in zip(*rows, strict=True))
    return em, f1, precision, recall
