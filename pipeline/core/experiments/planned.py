"""The runs of an experiment, each with its whole configuration, checked before any of them starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.core.config import EXSEARCH, Config
from pipeline.core.config.loading import read_tree
from pipeline.core.errors import UserError
from pipeline.core.experiments.spec import BEST, INDEXES, Arm, Experiment, overrides_of
from pipeline.core.report import best_iteration
from pipeline.core.retrieval import corpus_paths
from pipeline.core.run import RunFiles, check_directory, flatten, holds_same

Load = Callable[[Path, Sequence[str]], Config]
"""Reads a configuration file with overrides."""

DATA_SEED = {"data.seed": 0}
"""Draws the same questions for all seeds of training, unless the experiment says otherwise."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One arm under one seed: what `exsearch train --config FILE --run PATH OVERRIDES` makes.

    Attributes:
        index: that all runs share which search the same; None where the configuration names its own.
    """

    arm: Arm
    seed: int
    path: Path
    file: Path
    overrides: tuple[str, ...]
    config: Config
    index: Path | None

    @property
    def title(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.path)

    def is_begun(self) -> bool:
        return (self.path / "config.yaml").exists()

    def same_elsewhere(self) -> Path | None:
        """A finished run of another experiment of this folder that is the very same; None where this one is there."""
        if self.path.exists():
            return None
        home = self.path.parents[1]
        for path in sorted(home.parent.glob(f"*/*/{self.path.name}")):
            elsewhere = path.parents[1] != home and holds_same(path, self.config)
            if elsewhere and replace(self, path=path).is_finished():
                return path.resolve()
        return None

    def link(self) -> Path | None:
        """Make this run's directory a link to `same_elsewhere`, if there is one, and give that.

        A link that leads to nothing any more, or to a run that is not finished by this configuration, is removed: what
        is another experiment's is not trained on here.
        """
        if self.path.is_symlink() and not (self.path.exists() and self.is_finished()):
            self.path.unlink()
        other = self.same_elsewhere()
        if other is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.symlink_to(os.path.relpath(other, self.path.parent))
        return other

    def is_finished(self) -> bool:
        """Whether all iterations are whole, and the best of them is tested."""
        files, iterations = self.files, self.config.of_recipe
        last = max((int(done.parent.name) for done in self.path.glob("iterations/*/DONE")), default=0)
        if last < iterations.iterations:
            return False
        tested = files.finished(f"test/{BEST}")
        return tested is not None and tested["iteration"] == best_iteration(files, iterations)


def plan_runs(
    experiment: Experiment,
    out: Path,
    *,
    configs: Path,
    load: Load,
    defaults: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
) -> list[PlannedRun]:
    """All runs, arm by arm for the first seed, then for the next: what is finished early can be compared early.

    Args:
        out: folder of the experiment's arms, an absolute path.
        configs: folder of the shipped configurations.
        defaults: keys that are set where neither `base` nor the experiment says anything of them.
        overrides: `key=value` for all runs.

    Raises:
        UserError: a configuration that is wrong, with the arm; one that cannot be part of an experiment; a directory
            that holds another run.
    """
    spec = experiment.spec
    for override in overrides:
        _check_override(override, experiment)
    runs = []
    for seed in spec.seeds:
        for arm in experiment.with_runs:
            file = _file_of(arm.base or spec.base, experiment.file, configs)
            try:
                known = flatten(read_tree(file))
                free = {k: v for k, v in {**DATA_SEED, **(defaults or {})}.items() if k not in known}
                settings = (*overrides_of(free), *overrides_of(spec.common), *arm.overrides, *overrides)
                runs.append(_planned(arm, seed, out, file, settings, load))
            except UserError as error:
                raise UserError(f"{experiment.file}, arm {arm.name}: {error}") from error
    _check_tests(experiment, runs)
    return runs


def _planned(arm: Arm, seed: int, out: Path, file: Path, given: Sequence[str], load: Load) -> PlannedRun:
    if any(setting.startswith("seed=") for setting in given):
        raise UserError("the seed of a run is the experiment's to set; name them under `seeds`")
    settings = (*given, f"seed={seed}")
    config = load(file, settings)
    if config.storage.url is not None:
        raise UserError("storage.url would be one place for the copies of all runs; leave it null")
    if not config.data.test:
        raise UserError("data.test is empty; an experiment compares scores on test questions")
    if config.of_recipe.patience is not None:
        raise UserError(
            f"patience is {config.of_recipe.patience}, and an experiment compares all iterations of its runs; set "
            f"{config.section}.patience=null"
        )
    index = _shared_index(config, out.parent)
    if index is not None:
        settings = (*settings, f"retriever.index={json.dumps(str(index))}")
        config = load(file, settings)
    run = PlannedRun(arm, seed, out / arm.folder / f"seed-{seed}", file, settings, config, index)
    check_directory(run.path, config)
    return run


def _file_of(base: str, experiment: Path, configs: Path) -> Path:
    """A shipped configuration by its name, or a file beside the experiment's."""
    if "/" in base or base.endswith((".yaml", ".yml")):
        return (experiment.parent / base).resolve()
    return configs / f"{base}.yaml"


def _shared_index(config: Config, out: Path) -> Path | None:
    """Where in the folder of the experiments the index of this configuration is: one place for all runs with the same
    passages and encoder, and another one for those that search by words, too."""
    retriever = config.retriever
    if retriever.url is not None or retriever.index is not None:
        return None
    parts = ("encoder", "encoder_dtype", "query_prefix", "passage_prefix", "max_tokens", "factory")
    described = [corpus_paths(config.data), *(getattr(retriever, part) for part in parts)]
    if retriever.method != "dense":
        described.append("words")
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    return out / INDEXES / digest[:12]


def _check_override(override: str, experiment: Experiment) -> None:
    """One for all runs must not undo what the arms differ in."""
    key = override.partition("=")[0].strip()
    for varied in experiment.varied_keys:
        if key == varied or key.startswith(f"{varied}.") or varied.startswith(f"{key}."):
            raise UserError(
                f"override {override!r}: {varied} is what the arms of {experiment.name} differ in"
            )


def _check_tests(experiment: Experiment, runs: Sequence[PlannedRun]) -> None:
    """Every test that is looked at will have been made."""
    configs = {run.arm.name: run.config for run in runs}
    for arm in experiment.arms:
        if arm.test not in (made := _tests_of(configs[arm.of])):
            raise UserError(
                f"{experiment.file}, arm {arm.name}: runs of {arm.of} make no test {arm.test}; they make "
                f"{', '.join(made)}"
            )


def _tests_of(config: Config) -> list[str]:
    """The names of the tests that a run makes."""
    if config.recipe != EXSEARCH:
        return ["start", BEST]
    cold = config.cold_start
    starts_cold = cold.questions > 0 or cold.trajectories is not None
    return [
        "base",
        *(["cold_start"] if starts_cold else []),
        *(["no_search", "one_search"] if config.evaluation.baselines else []),
        BEST,
    ]
