"""What a run was asked: its questions with their gold answers and passages, as far as they can be had.

The files of questions that the configuration names are read, all of each split at once. Where they are not there any
more, the tables of evaluations still say what was asked; of a training question there are then its words alone, out of
the prompt.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipeline.core.config import EXSEARCH, WeightingConfig, section_of
from pipeline.core.config.loading import read_tree
from pipeline.core.data.questions import read_questions
from pipeline.core.errors import UserError
from pipeline.core.models import cached_files, read_tokenizer
from pipeline.core.records import Question
from pipeline.core.run import RunFiles
from pipeline.core.scoring.answers import ProtocolName
from pipeline.view.stored import checksum

logger = logging.getLogger(__name__)


class Asked:
    """Of one run. Any thread may call any method."""

    def __init__(self, run: RunFiles) -> None:
        self._run = run
        self._splits: dict[str, dict[str, Question]] = {}
        self._words: dict[str, npt.NDArray[np.int64]] = {}
        self._tokenizers: dict[str, Any] = {}
        # Two, so that nobody who asks for questions waits for a tokenizer.
        self._of_splits, self._of_tokenizers = threading.Lock(), threading.Lock()

    @cached_property
    def config(self) -> dict[str, Any]:
        """As it is stored: also of another version, whose keys this one may not know."""
        return read_tree(self._run.path / "config.yaml")

    @property
    def recipe(self) -> str:
        return str(self.config.get("recipe", EXSEARCH))

    @property
    def protocol(self) -> ProtocolName:
        """By whose rules answers are compared."""
        found: ProtocolName = self._section("evaluation").get("protocol", "exsearch")
        return found

    @cached_property
    def weighting(self) -> WeightingConfig:
        """Of the run; the default where this version knows none like it."""
        try:
            return WeightingConfig.model_validate(self._section("weighting"))
        except ValidationError:
            return WeightingConfig()

    def of(self, split: str) -> dict[str, Question]:
        """By their ids the questions of a split; empty, and a word in the log, if they cannot be read."""
        with self._of_splits:
            if split not in self._splits and (found := self._read(split)):
                self._splits[split] = found
            return self._splits.get(split, {})

    def words_of(self, split: str, marks: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Of the questions with these checksums (CRC-32) of their ids those of their words; -1 where they are not
        known."""
        if (questions := self.of(split)) and split not in self._words:
            pairs = [(zlib.crc32(id_.encode()), checksum(q.text)) for id_, q in questions.items()]
            self._words[split] = np.array(sorted(pairs), np.int64)
        if (known := self._words.get(split)) is None:
            return np.full(len(marks), -1, np.int64)
        places = np.searchsorted(known[:, 0], marks).clip(max=len(known) - 1)
        found: npt.NDArray[np.int64] = np.where(known[places, 0] == marks, known[places, 1], -1)
        return found

    def tokenizer(self, role: str) -> Any:
        """That of the newest exported model of the role's policy, else of the model that it began with, which may be in
        the cache of the hub, else of any policy; None, and a word in the log, if none of them is there."""
        with self._of_tokenizers:
            if role not in self._tokenizers and (found := self._load_tokenizer(role)) is not None:
                self._tokenizers[role] = found
            return self._tokenizers.get(role)

    def _load_tokenizer(self, role: str) -> Any:
        started = self._section(section_of(self.recipe)).get(role) or self._section("model").get("path")
        models = [
            *self._exported(role),
            *([] if (found := cached_files(str(started))) is None else [found]),
            *self._exported("*"),
        ]
        return next((found for model in models if (found := _tokenizer(model)) is not None), None)

    def _exported(self, policy: str) -> list[Path]:
        """The models of a policy, the newest first."""
        return sorted(self._run.path.glob(f"iterations/*/{policy}/model"), reverse=True)

    def _section(self, name: str) -> dict[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def _read(self, split: str) -> dict[str, Question]:
        data = self._section("data")
        if not (paths := data.get(split)):
            return {}
        try:
            questions = read_questions(paths, root=data.get("root", "."))
        except UserError as error:
            logger.warning(
                f"the {split} questions of {self._run.path} are shown without gold passages: {error}"
            )
            return {}
        return {question.id: question for question in questions}


def question_of(id_: str, row: Mapping[str, Any], questions: Mapping[str, Question]) -> Question:
    """As its file has it; else as the row of an evaluation does; else its id alone."""
    if id_ in questions:
        return questions[id_]
    return Question(
        id=id_,
        text=row.get("question") or "",
        answers=tuple(row.get("gold_answers") or ()),
        type=row.get("type") or "",
        hops=row.get("hops"),
    )


def _tokenizer(model: Path) -> Any:
    if not (model / "tokenizer.json").is_file() and not (model / "tokenizer_config.json").is_file():
        return None
    try:
        return read_tokenizer(str(model))
    except UserError as error:
        logger.warning(str(error))
        return None
