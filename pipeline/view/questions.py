"""What a run was asked: its questions with their gold answers and passages, as far as they can be had.

The files of questions that the configuration names are read, all of each split at once. Where they are not there any
more, the tables of evaluations still say what was asked; of a training question there are then its words alone, out of
the prompt.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core.config import EXSEARCH
from pipeline.core.config.loading import read_tree
from pipeline.core.data.questions import read_questions
from pipeline.core.errors import UserError
from pipeline.core.models import read_tokenizer
from pipeline.core.records import Question
from pipeline.core.run import RunFiles
from pipeline.core.scoring.answers import ProtocolName

logger = logging.getLogger(__name__)


class Asked:
    """Of one run."""

    def __init__(self, run: RunFiles) -> None:
        self._run = run
        self._splits: dict[str, dict[str, Question]] = {}

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
        found: ProtocolName = self.section("evaluation").get("protocol", "exsearch")
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """That of the newest exported model of any policy, else of the model that the run began with; None if neither
        is there."""
        exported = sorted(self._run.path.glob("iterations/*/*/model/tokenizer.json"))
        for path in [*(str(path.parent) for path in reversed(exported)), self.section("model").get("path")]:
            if path and Path(path).is_dir():
                try:
                    return read_tokenizer(path)
                except UserError as error:
                    logger.warning(str(error))
        return None

    def section(self, name: str) -> dict[str, Any]:
        """Of the configuration; empty if it has none of that name."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def of(self, split: str) -> dict[str, Question]:
        """By their ids the questions of a split; empty, and a word in the log, if they cannot be read."""
        if split not in self._splits:
            self._splits[split] = self._read(split)
        return self._splits[split]

    def _read(self, split: str) -> dict[str, Question]:
        data = self.section("data")
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
