"""Scores of an evaluation by question: further columns of its table of trajectories, by which evaluations are paired.

`iterations/0003/evaluation.parquet`, `test/best.parquet` and what `exsearch evaluate --out` writes have them. They hold
the questions as well, so that two runs can be compared without the files that these came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.evaluation import score_questions
from pipeline.core.record_tables import trajectories_to_table
from pipeline.core.records import Question, Trajectory
from pipeline.core.scoring.answers import METRICS as OF_ANSWERS
from pipeline.core.scoring.answers import ProtocolName

METRICS = (*OF_ANSWERS, "gold_recall")
"""Each in [0, 1]. `gold_recall` is null where a question names no gold passages, or passages came without ids."""
SHARES = ("em", "accuracy")
"""Those that are 0 or 1."""

SCORE_SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("gold_answers", pa.list_(pa.string())),
        ("hops", pa.int32()),
        ("type", pa.string()),
        *((name, pa.float64()) for name in METRICS),
    ]
)
_WITH_ANSWERS = ("question_id", "answer", *SCORE_SCHEMA.names)
_SCORED_BY = b"exsearch.scored_by"
"""Key of the protocol in the metadata of the table."""
T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """Of one evaluation, a row per question in the order of the questions. `values[metric]` is float64 [n], NaN where
    there is none; `protocol` says by whose rules."""

    protocol: str
    ids: Sequence[str]
    questions: Sequence[str]
    gold_answers: Sequence[Sequence[str]]
    hops: Sequence[int | None]
    types: Sequence[str]
    answers: Sequence[str]
    values: dict[str, npt.NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def asked(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """By its id, what each question asks and what counts as its answer."""
        return {
            id_: (text, tuple(golds))
            for id_, text, golds in zip(self.ids, self.questions, self.gold_answers, strict=True)
        }

    def in_order_of(self, other: Scores) -> Scores:
        """The same rows in the order of another evaluation of the same questions."""
        place = {id_: row for row, id_ in enumerate(self.ids)}
        order = [place[id_] for id_ in other.ids]

        def moved(column: Sequence[T]) -> list[T]:
            return [column[row] for row in order]

        return Scores(
            self.protocol,
            moved(self.ids),
            moved(self.questions),
            moved(self.gold_answers),
            moved(self.hops),
            moved(self.types),
            moved(self.answers),
            {name: values[order] for name, values in self.values.items()},
        )


def scored_table(
    questions: Sequence[Question], trajectories: Sequence[Trajectory], protocol: ProtocolName
) -> pa.Table:
    """The table of the trajectories of an evaluation, one per question, with their scores beside them."""
    table = trajectories_to_table(trajectories)
    by_id = {row.question.id: row for row in score_questions(questions, trajectories, protocol)}
    rows = [by_id[trajectory.question_id] for trajectory in trajectories]
    columns = {
        "question": [row.question.text for row in rows],
        "gold_answers": [list(row.question.answers) for row in rows],
        "hops": [row.question.hops for row in rows],
        "type": [row.question.type for row in rows],
        **{name: [getattr(row.score, name) for row in rows] for name in OF_ANSWERS},
        "gold_recall": [None if row.recalls is None else row.final_recall for row in rows],
    }
    for field in SCORE_SCHEMA:
        table = table.append_column(field, pa.array(columns[field.name], field.type))
    return table.replace_schema_metadata({_SCORED_BY: protocol})


def read_scores(path: Path) -> Scores | None:
    """What `scored_table` left in a file; None if there is no such file, or it was written by an earlier version, which
    kept no scores by question.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        schema = pq.read_schema(path)
        if not set(_WITH_ANSWERS) <= set(schema.names):
            return None
        columns = pq.read_table(path, columns=list(_WITH_ANSWERS)).to_pydict()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is damaged ({error!s:.200}); copy it back from where it is whole") from error
    return Scores(
        (schema.metadata or {}).get(_SCORED_BY, b"").decode(),
        columns["question_id"],
        columns["question"],
        columns["gold_answers"],
        columns["hops"],
        columns["type"],
        columns["answer"],
        {name: np.array(columns[name], dtype=np.float64) for name in METRICS},
    )
