"""Retrieval alone: recall of the gold passages in the top 3, 5 and 10 of one search with the question.

python -m bench.recall --index DIR [--root DIR] [--method METHOD ...] FILE.jsonl [FILE.jsonl ...]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from pipeline.core.data.questions import read_questions
from retriever_service.choices import Method
from retriever_service.passages.hits import SearchOptions
from retriever_service.search.engine import SearchEngine

DEPTHS = (3, 5, 10)


def main() -> None:
    """Prints one row per question file and method, in percent."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path, required=True, help="a built index")
    parser.add_argument("--root", default="", help="folder that the files are in")
    parser.add_argument("--search-parameters", default="", help="of an approximate index, e.g. nprobe=64")
    parser.add_argument(
        "--method",
        action="append",
        choices=get_args(Method),
        help="how to search; several in turn (default: dense)",
    )
    parser.add_argument("files", nargs="+", help="questions with supporting_ids")
    arguments = parser.parse_args()
    searcher = SearchEngine.open(arguments.index, search_parameters=arguments.search_parameters)
    columns = [f"recall@{k}" for k in DEPTHS] + [f"all gold in top {DEPTHS[-1]}"]
    table = Table("set", "questions", "method", *columns)
    for file, method in itertools.product(arguments.files, arguments.method or ["dense"]):
        questions = [q for q in read_questions([file], root=arguments.root) if q.supporting_ids]
        results = searcher.search([q.text for q in questions], DEPTHS[-1], SearchOptions(method))
        found = [
            [
                sum(hit.passage.id in q.supporting_ids for hit in hits[:k]) / len(q.supporting_ids)
                for k in DEPTHS
            ]
            for q, hits in zip(questions, results, strict=True)
        ]
        shares = [sum(row[column] for row in found) / len(found) for column in range(len(DEPTHS))]
        shares.append(sum(row[-1] == 1.0 for row in found) / len(found))
        table.add_row(file, str(len(questions)), method, *(f"{100 * share:.1f}" for share in shares))
    Console().print(table)


if __name__ == "__main__":
    main()
