"""The published evaluations of whole sets, said again as plainly as possible over rows and files in the sets' own form,
without code of the project. All scores are in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.pipeline.core.scoring.restated import ASCII_PUNCTUATION, best

Row = Mapping[str, Any]
FOUR = ("em", "f1", "prec", "recall")


def f_one(precision: float, recall: float) -> float:
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def four_of_lists(said: Sequence[Any], gold: Sequence[Any]) -> tuple[float, float, float, float]:
    """(EM, F1, precision, recall): what is right and what is wrong of `said`, what is missed of `gold`."""
    right = [one for one in said if one in gold]
    wrong = [one for one in said if one not in gold]
    missed = [one for one in gold if one not in said]
    precision = len(right) / (len(right) + len(wrong)) if right or wrong else 0.0
    recall = len(right) / (len(right) + len(missed)) if right or missed else 0.0
    em = 1.0 if not wrong and not missed else 0.0
    return em, f_one(precision, recall), precision, recall


def without_doubles(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


def joint(*parts: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    em = precision = recall = 1.0
    for part in parts:
        em, precision, recall = em * part[0], precision * part[2], recall * part[3]
    return em, f_one(precision, recall), precision, recall


def add(totals: dict[str, float], prefix: str, values: Sequence[float]) -> None:
    for name, value in zip(FOUR, values, strict=True):
        totals[prefix + name] += value


def percent(totals: Mapping[str, float], n: int) -> dict[str, float]:
    return {name: 100 * total / n for name, total in totals.items()}


def hotpotqa(rows: Sequence[Row], prediction: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    totals = {prefix + name: 0.0 for prefix in ("", "sp_", "joint_") for name in FOUR}
    for row in rows:
        answer = facts = None
        if row["_id"] in prediction["answer"]:
            answer = best("hotpotqa", prediction["answer"][row["_id"]], [row["answer"]])
            add(totals, "", answer)
        if row["_id"] in prediction["sp"]:
            said = without_doubles(prediction["sp"][row["_id"]])
            facts = four_of_lists(said, without_doubles(row["supporting_facts"]))
            add(totals, "sp_", facts)
        if answer and facts:
            add(totals, "joint_", joint(answer, facts))
    return percent(totals, len(rows))


def two_wiki(
    rows: Sequence[Row], prediction: Mapping[str, Mapping[str, Any]], aliases: Mapping[str, list[str]]
) -> dict[str, float]:
    """`aliases`: other names by the id of an entity."""
    totals = {prefix + name: 0.0 for prefix in ("", "sp_", "evi_", "joint_") for name in FOUR}
    for row in rows:
        answer = facts = triples = None
        if row["_id"] in prediction["answer"]:
            names = [row["answer"], *aliases.get(row["answer_id"], [])]
            answer = best("2wikimultihopqa", prediction["answer"][row["_id"]], names)
            add(totals, "", answer)
        if row["_id"] in prediction["sp"]:
            said, gold = (  # doubles that only differ in case are found out too late, and count
                [[title.lower(), number] for title, number in without_doubles(given)]
                for given in (prediction["sp"][row["_id"]], row["supporting_facts"])
            )
            facts = four_of_lists(said, gold)
            add(totals, "sp_", facts)
        if row["_id"] in prediction["evidence"]:
            triples = four_of_triples(prediction["evidence"][row["_id"]], row, aliases)
            add(totals, "evi_", triples)
        if answer and facts and triples:
            add(totals, "joint_", joint(answer, facts, triples))
    return percent(totals, len(rows))


def four_of_triples(
    said: Sequence[Sequence[str]], row: Row, aliases: Mapping[str, list[str]]
) -> tuple[float, float, float, float]:
    plain_said = without_doubles([[plain(text) for text in triple] for triple in said])
    groups = []
    for (subject, relation, object_), (subject_id, _, object_id) in zip(
        row["evidences"], row["evidences_id"], strict=True
    ):
        subjects, objects = [subject, *aliases.get(subject_id, [])], [object_, *aliases.get(object_id, [])]
        groups.append([[plain(s), plain(relation), plain(o)] for s in subjects for o in objects])
    matches = 0
    for triple in plain_said:
        if any(triple in group for group in groups):
            matches += 1
    precision = matches / len(plain_said) if plain_said else 0.0
    recall = matches / len(groups) if groups else 0.0
    em = 1.0 if matches == len(plain_said) and matches == len(groups) else 0.0
    return em, f_one(precision, recall), precision, recall


def plain(text: str) -> str:
    return " ".join("".join(char for char in text.lower() if char not in ASCII_PUNCTUATION).split())


def musique(rows: Sequence[Row], predicted: Sequence[Row]) -> dict[str, float]:
    totals = {"answer_em": 0.0, "answer_f1": 0.0, "support_f1": 0.0}
    for row, said in zip(rows, predicted, strict=True):
        em, f1, *_ = best("musique", said["predicted_answer"], [row["answer"], *row["answer_aliases"]])
        totals["answer_em"] += em
        totals["answer_f1"] += f1
        gold = [paragraph["idx"] for paragraph in row["paragraphs"] if paragraph["is_supporting"]]
        places = without_doubles(said["predicted_support_idxs"])
        totals["support_f1"] += four_of_lists(places, gold)[1] if places or gold else 1.0
    return percent(totals, len(rows))


def kilt(rows: Sequence[Row], guesses: Sequence[Row]) -> dict[str, float]:
    totals = {"em": 0.0, "f1": 0.0, "Rprec": 0.0, "KILT-em": 0.0, "KILT-f1": 0.0}
    for row, guess in zip(rows, guesses, strict=True):
        golds = [output["answer"].strip() for output in row["output"] if output.get("answer", "").strip()]
        em, f1, *_ = best("kilt", guess["output"][0]["answer"].strip(), golds)
        said = without_doubles([page["wikipedia_id"] for page in guess["output"][0]["provenance"]])
        precisions = []
        for output in row["output"]:
            gold = without_doubles([page["wikipedia_id"] for page in output.get("provenance", [])])
            hits = [page for page in said[: len(gold)] if page in gold]
            precisions.append(len(hits) / len(gold) if gold else 0.0)
        totals["em"] += em
        totals["f1"] += f1
        totals["Rprec"] += max(precisions)
        if max(precisions) == 1:
            totals["KILT-em"] += em
            totals["KILT-f1"] += f1
    return percent(totals, len(rows))
