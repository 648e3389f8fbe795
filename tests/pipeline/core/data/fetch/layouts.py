"""Small copies of the data sets in each layout that they come in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""By the authors' name of the split."""


def hotpot_row(number: int) -> dict[str, Any]:
    """As in the authors' file; the paragraph "Trel" comes with every question."""
    return {
        "_id": f"5a{number}",
        "question": f"Who founded the maker of harp {number}?",
        "answer": f"Ada {number}",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[f"Harp {number}", 1], [f"Maker {number}", 0]],
        "context": [
            ["Trel", ["Trel is a town.", " It has harps."]],
            [f"Harp {number}", ["A harp.", f" Maker {number} made harp {number}."]],
            [f"Maker {number}", [f"Maker {number} was founded by Ada {number}."]],
        ],
    }


HOTPOT: Rows = {"train": [hotpot_row(1), hotpot_row(2)], "validation": [hotpot_row(3)]}


def as_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """HotpotQA's lists of pairs as the hub's and FlashRAG's columns."""
    titles, sentences = zip(*row["context"], strict=True)
    facts, numbers = zip(*row["supporting_facts"], strict=True)
    return {
        "supporting_facts": {"title": list(facts), "sent_id": list(numbers)},
        "context": {"title": list(titles), "sentences": list(sentences)},
    }


def hotpot_originals(folder: Path) -> None:
    names = {"train": "hotpot_train_v1.1.json", "validation": "hotpot_dev_distractor_v1.json"}
    for split, rows in HOTPOT.items():
        (folder / names[split]).write_text(json.dumps(rows))
    (folder / "hotpot_test_fullwiki_v1.json").write_text('[{"_id": "t", "question": "?"}]')


def hotpot_hub(folder: Path) -> None:
    for split, rows in HOTPOT.items():
        table = [{"id": r["_id"], **without(r, "_id"), **as_columns(r)} for r in rows]
        for config in ("distractor", "fullwiki"):
            (folder / config).mkdir(exist_ok=True)
            for number, row in enumerate(table if config == "distractor" else table[:1]):
                name = f"{split}-{number:05}-of-{len(table):05}.parquet"
                pq.write_table(pa.Table.from_pylist([row]), folder / config / name)


def hotpot_saved(folder: Path) -> None:
    import datasets

    splits = {
        split: datasets.Dataset.from_list(
            [{"id": r["_id"], **without(r, "_id"), **as_columns(r)} for r in rows]
        )
        for split, rows in HOTPOT.items()
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))


def hotpot_flashrag(folder: Path) -> None:
    (folder / "hotpotqa").mkdir()
    for split, name in (("train", "train"), ("validation", "dev")):
        rows = [
            {
                "id": r["_id"],
                "question": r["question"],
                "golden_answers": [r["answer"]],
                "metadata": {"type": r["type"], "level": r["level"], **as_columns(r)},
            }
            for r in HOTPOT[split]
        ]
        write_lines(folder / "hotpotqa" / f"{name}.jsonl", rows)


HOTPOT_LAYOUTS: Mapping[str, Callable[[Path], None]] = {
    "the authors' files": hotpot_originals,
    "the hub's Parquet": hotpot_hub,
    "a saved data set": hotpot_saved,
    "FlashRAG": hotpot_flashrag,
}


def musique_originals(folder: Path) -> None:
    def row(number: int, answerable: bool = True) -> dict[str, Any]:
        texts = [f"Maker {number} made harp {number}.", "Trel is a town.", f"Ada {number} founded it."]
        return {
            "id": f"2hop__{number}_{number}",
            "paragraphs": [
                {"idx": idx, "title": f"T{number}-{idx}", "paragraph_text": text, "is_supporting": idx != 1}
                for idx, text in enumerate(texts)
            ],
            "question": f"Who founded the maker of harp {number}?",
            "question_decomposition": [
                {"id": 1, "question": "harp >> maker", "answer": "Maker", "paragraph_support_idx": 0},
                {
                    "id": 2,
                    "question": "Who founded #1?",
                    "answer": f"Ada {number}",
                    "paragraph_support_idx": 2,
                },
            ],
            "answer": f"Ada {number}",
            "answer_aliases": [f"A. {number}"],
            "answerable": answerable,
        }

    write_lines(folder / "musique_ans_v1.0_train.jsonl", [row(1), row(2), row(9, answerable=False)])
    write_lines(folder / "musique_ans_v1.0_dev.jsonl", [row(3)])
    write_lines(folder / "musique_full_v1.0_dev.jsonl", [row(4)])


def two_wiki_originals(folder: Path) -> None:
    row = {
        "_id": "w1",
        "type": "compositional",
        "question": "Who is the father of the founder of Orvane?",
        "context": [
            ["Orvane", ["Orvane was founded by Ada.", "It is a maker."]],
            ["Ada", ["Ada is of Trel."]],
        ],
        "supporting_facts": [["Orvane", 0], ["Ada", 0]],
        "evidences": [["Orvane", "founded by", "Ada"], ["Ada", "father", "George"]],
        "evidences_id": [["Q1", "founded by", "Q2"], ["Q2", "father", "Q3"]],
        "answer": "George",
        "answer_id": "Q3",
    }
    (folder / "data").mkdir()
    (folder / "data" / "train.json").write_text(json.dumps([{**row, "_id": "w0", "question": "Who?"}]))
    (folder / "data" / "dev.json").write_text(json.dumps([row]))
    (folder / "data" / "test.json").write_text(json.dumps([without(row, "answer")]))
    names = [
        {"Q_id": "Q2", "aliases": ["A. L."], "demonyms": []},
        {"Q_id": "Q3", "aliases": ["Lord George"], "demonyms": []},
    ]
    write_lines(folder / "data" / "id_aliases.json", names)


def nq_hub(folder: Path) -> None:
    (folder / "nq_open").mkdir()
    for split in ("train", "validation"):
        rows = [{"question": f"who was first in {split}", "answer": ["Ada", "A. L."]}] * 2
        pq.write_table(pa.Table.from_pylist(rows), folder / "nq_open" / f"{split}-00000-of-00001.parquet")


def nq_flashrag(folder: Path) -> None:
    for split in ("train", "dev", "test"):
        write_lines(
            folder / f"{split}.jsonl",
            [{"id": f"{split}_0", "question": f"who was first in {split}", "golden_answers": ["Ada"]}],
        )


def trivia_originals(folder: Path) -> None:
    (folder / "triviaqa-unfiltered").mkdir()
    for split in ("train", "dev", "test-without-answers"):
        row: dict[str, Any] = {"Question": f"Who in {split}?", "QuestionId": f"tc_{split}"}
        if "test" not in split:
            row["Answer"] = {"Value": "Ada", "Aliases": ["Ada", "A. L."], "NormalizedAliases": ["ada", "l"]}
        path = folder / "triviaqa-unfiltered" / f"unfiltered-web-{split}.json"
        path.write_text(json.dumps({"Data": [row], "Domain": "unfiltered-web", "Version": 1.0}, indent=2))


def trivia_hub(folder: Path) -> None:
    (folder / "unfiltered.nocontext").mkdir()
    for split, value in (("train", "Ada"), ("validation", "<unk>")):
        answer = {"value": value, "aliases": ["Ada", "A. L."], "normalized_aliases": ["ada", "l"]}
        rows = [{"question_id": f"tc_{split}", "question": f"Who in {split}?", "answer": answer}]
        path = folder / "unfiltered.nocontext" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)


def popqa_hub(folder: Path) -> None:
    header = "id\tsubj\tprop\tobj\tquestion\tpossible_answers\n"
    row = '7\tAda\toccupation\tpoet\tWhat is Ada?\t"[""poet"", ""bard""]"\n'
    (folder / "test.tsv").write_text(header + row)


def bamboogle_originals(folder: Path) -> None:
    (folder / "Bamboogle Prerelease - Sheet1.csv").write_text('Question,Answer\n"Who, then?",Ada\n')


def without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
