"""Rows and predictions in each set's own form, drawn by chance from few values, so that they often agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from tests.pipeline.core.scoring.cases import WORDS

Row = Mapping[str, Any]
ALIASES = {"id of Orvane": ["Orvane Ltd.", "the Orvane"], "id of Mara Velin": ["M. Velin"]}
ENTITIES = ["Orvane", "Mara Velin", "Trel", "yes"]


class Chance(Random):
    """Draws rows and predictions from few values, so that they often agree."""

    def some(self, values: Sequence[Any], least: int, most: int) -> list[Any]:
        return [self.choice(values) for _ in range(self.randint(least, most))]

    def ids(self) -> list[str]:
        return self.sample("abcd", self.randint(1, 3))

    def said(self) -> str:
        """An answer, maybe an empty one."""
        return self.choice([" ", " ", "", "-"]).join(self.some([*WORDS, *ENTITIES], 0, 3))

    def gold(self) -> str:
        return self.said().strip() or "Orvane"

    def facts(self, least: int = 0) -> list[list[Any]]:
        return self.some([["Orvane", 0], ["orvane", 0], ["Orvane", 1], ["Trel", 0]], least, 4)

    def triples(self, least: int = 0) -> list[list[str]]:
        subjects, objects = [*ENTITIES, "orvane ltd", "The Orvane"], [*ENTITIES, "M Velin"]
        relations = ["founder", "maker"]
        return [
            [self.choice(subjects), self.choice(relations), self.choice(objects)]
            for _ in range(self.randint(least, 3))
        ]

    def pages(self, least: int = 0) -> list[Row]:
        return [{"wikipedia_id": page} for page in self.some("123", least, 4)]

    def part(self, names: Sequence[str], draw: Callable[[], Any]) -> dict[str, Any]:
        """Of some of these questions, always of the first: a file without any is refused."""
        return {name: draw() for name in names if name == names[0] or self.random() < 0.7}


def hotpotqa_files(by: Chance) -> tuple[list[Row], dict[str, Any]]:
    names = by.ids()
    rows = [{"_id": name, "answer": by.gold(), "supporting_facts": by.facts(1)} for name in names]
    return rows, {"answer": by.part(names, by.said), "sp": by.part(names, by.facts)}


def two_wiki_files(by: Chance) -> tuple[list[Row], dict[str, Any]]:
    names = by.ids()
    rows = []
    for name in names:
        answer, evidences = by.choice(ENTITIES), by.triples(1)
        rows.append(
            {
                "_id": name,
                "answer": answer,
                "answer_id": f"id of {answer}",
                "supporting_facts": by.facts(1),
                "evidences": evidences,
                "evidences_id": [[f"id of {s}", r, f"id of {o}"] for s, r, o in evidences],
            }
        )
    prediction = {
        "answer": by.part(names, by.said),
        "sp": by.part(names, by.facts),
        "evidence": by.part(names, by.triples),
    }
    return rows, prediction


def musique_files(by: Chance) -> tuple[list[Row], list[Row]]:
    rows, predicted = [], []
    for name in by.ids():
        supports = by.some([True, False], 1, 4)
        rows.append(
            {
                "id": name,
                "answer": by.gold(),
                "answer_aliases": [by.gold() for _ in range(by.randint(0, 2))],
                "paragraphs": [
                    {"idx": place, "is_supporting": supporting} for place, supporting in enumerate(supports)
                ],
            }
        )
        predicted.append(
            {
                "id": name,
                "predicted_answer": by.said(),
                "predicted_support_idxs": by.some(range(5), 0, 4),
                "predicted_answerable": True,
            }
        )
    return rows, predicted


def kilt_files(by: Chance) -> tuple[list[Row], list[Row]]:
    rows, guesses = [], []
    for name in by.ids():
        outputs: list[Row] = [{"answer": by.gold(), "provenance": by.pages(1)}]
        outputs += [{"provenance": by.pages()}] if by.random() < 0.5 else []
        outputs += [{"answer": by.gold()}] if by.random() < 0.5 else []
        rows.append({"id": name, "output": outputs})
        guesses.append({"id": name, "output": [{"answer": by.said(), "provenance": by.pages()}]})
    return rows, guesses
