"""Newer iterations of a run, as they are finished."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.agents.search import SEARCHER
from pipeline.core.errors import UserError
from pipeline.core.models import check_export, check_model
from pipeline.core.policies import Snapshot
from pipeline.core.run import RunFiles


class Following:
    """The searcher of a run, in its newest version."""

    def __init__(self, run: Path) -> None:
        self._files = RunFiles(run)

    def newest(self) -> Snapshot:
        """
        Raises:
            UserError: the run has trained no searcher yet, or its newest model is not whole.
        """
        if (found := self.newer(-1)) is None:
            raise UserError(
                f"{self._files.path} has no trained searcher yet; wait for its first iteration, or serve the model "
                "that it starts from with --model"
            )
        check_model(found.model)
        check_export(Path(found.model))
        return found

    def newer(self, version: int) -> Snapshot | None:
        """The newest version if it is newer than this one, and its model is there."""
        newest = self._files.newest_version(SEARCHER)
        model = self._files.at(f"{newest}/{SEARCHER}/model")
        return Snapshot(newest, str(model)) if newest > version and model.is_dir() else None
