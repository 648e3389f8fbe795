"""The questions of a run, checked before anything expensive starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core.config import DataConfig
from pipeline.core.data.questions import check_splits_disjoint, read_questions
from pipeline.core.errors import UserError
from pipeline.core.records import Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Splits:
    """`test` may be empty; so may `train` and `dev` where nothing is trained."""

    train: list[Question]
    dev: list[Question]
    test: list[Question]


def load_splits(
    data: DataConfig, seed: int, *, required: Sequence[str] = (), apart: Sequence[str] = ()
) -> Splits:
    """Read and sample the three splits.

    Args:
        seed: of the run; `data.seed` goes before it.
        required: splits that must not be empty.
        apart: further question files that are trained on, and must share nothing with dev and test.

    Raises:
        UserError: a bad file, overlapping splits, or an empty one that is required.
    """
    for key in required:
        if not getattr(data, key):
            raise UserError(f"data.{key} is empty; name at least one file of questions (docs/formats.md)")

    def read(split: str) -> list[Question]:
        paths = getattr(data, split)
        limit = getattr(data, f"{split}_limit")
        if not paths:
            return []
        return read_questions(
            paths,
            root=data.root,
            limit=limit,
            seed=data.sample_seed(seed),
            hops=data.hops_of(split),
            max_answers=data.max_answers,
        )

    splits = Splits(read("train"), read("dev"), read("test"))
    _say_what_is_not_scored(splits.train, data.max_answers)
    check_splits_disjoint(splits.train, splits.dev, splits.test)
    if apart:
        check_splits_disjoint(read_questions(apart, root=data.root), splits.dev, splits.test)
    return splits


def _say_what_is_not_scored(train: Sequence[Question], max_answers: int) -> None:
    left_out = [len(set(q.answers)) - len(q.distinct_answers) for q in train]
    if any(left_out):
        logger.info(
            f"data.max_answers is {max_answers}: {sum(left_out):,} further answers of {sum(map(bool, left_out)):,} "
            "training questions are accepted as right, but their likelihood is not scored"
        )
