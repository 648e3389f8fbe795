"""Where answers are lost between search and answer: how often a test is right, given what the agent found and noted.

    python -m bench.reading RUN/test/best.parquet [FILE ...]

Files of scores by question (docs/formats.md). Right answers (EM) in percent and questions, for those whose gold
passages were all found, and, of the questions that are not answered by yes or no, for those of which an accepted
answer stands in what was found, and in what was noted. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from bench.measure import print_table

_COLUMNS = ["em", "gold_recall", "gold_answers", "steps"]
Row = dict[str, Any]


def main() -> None:
    """Prints the table to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="scores by question")
    rows = []
    for path in parser.parse_args().files:
        every = pq.read_table(path, columns=_COLUMNS).to_pylist()
        open_ = [row for row in every if not {"yes", "no"} & {a.strip().lower() for a in row["gold_answers"]}]
        groups = [
            every,
            [row for row in every if row["gold_recall"] == 1],
            open_,
            [row for row in open_ if _holds(row, _found(row))],
            [row for row in open_ if _holds(row, " ".join(step["record"] for step in row["steps"]))],
        ]
        rows.append([path.stem, *map(_right, groups)])
    print_table("test; all; all gold found; not yes or no; answer in passages; answer in notes", rows)


def _found(row: Row) -> str:
    return " ".join(f"{hit['title']} {hit['text']}" for step in row["steps"] for hit in step["hits"])


def _holds(row: Row, text: str) -> bool:
    return any(answer.lower() in text.lower() for answer in row["gold_answers"])


def _right(rows: Sequence[Row]) -> str:
    return f"{100 * sum(row['em'] for row in rows) / len(rows):.1f} ({len(rows)})" if rows else "(0)"


if __name__ == "__main__":
    main()
