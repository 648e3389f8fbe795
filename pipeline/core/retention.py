"""Which exported models and learner checkpoints of a run stay on disk (`storage`).

What goes is moved aside under a hidden name before it is removed: a kill leaves a directory whole or leaves none.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.core.config import Iterations, StorageConfig
from pipeline.core.report import best_iterations
from pipeline.core.run import RunFiles

logger = logging.getLogger(__name__)

_ASIDE = ".{}.removed"


def remove_what_need_not_stay(run: RunFiles, t: int, iterations: Iterations, storage: StorageConfig) -> None:
    """Iteration t is whole: remove learner checkpoints and, with `keep_last`, models that nothing needs any more."""
    for leftover in run.path.glob(f"iterations/*/*/{_ASIDE.format('*')}"):
        shutil.rmtree(leftover)
    needed = set(range(t + 1))
    if storage.keep_last is not None:
        needed = {0, *range(t + 1 - storage.keep_last, t + 1)}
        needed |= set(best_iterations(run, iterations)[: storage.keep_best])
    for policy in run.trained():
        versions = [version for version in run.versions(policy) if version <= t]
        stay = {run.newest_version(policy, up_to=iteration) for iteration in needed}
        models = [v for v in _with(run, policy, "model", versions) if v not in stay]
        states = list(_with(run, policy, "learner", versions))[: -storage.keep_states]
        for name, going in (("model", models), ("learner", states)):
            for version in going:
                _remove(run.at(f"{version}/{policy}/{name}"))
        if models:
            logger.info(
                f"models of {policy} that were removed: {_list(models)}; those of {_list(sorted(stay - {-1}))} stay "
                f"(storage.keep_last: {storage.keep_last}, storage.keep_best: {storage.keep_best})"
            )


def _with(run: RunFiles, policy: str, name: str, versions: Iterable[int]) -> Iterator[int]:
    return (version for version in versions if run.at(f"{version}/{policy}/{name}").is_dir())


def _remove(directory: Path) -> None:
    aside = directory.with_name(_ASIDE.format(directory.name))
    os.replace(directory, aside)
    shutil.rmtree(aside)


def _list(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions))
