"""An experiment as its file says it: arms, seeds, and what is to be shown. docs/experiments.md describes the file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from pipeline.core.config import Section
from pipeline.core.config.loading import read_tree
from pipeline.core.data.world.spec import Size
from pipeline.core.errors import UserError, suggestion
from pipeline.core.run import flatten
from pipeline.core.shipped import CONFIGS

Metric = Literal["em", "f1", "accuracy"]
TableName = Literal["test", "hops", "types", "searches", "iterations", "cost"]
PlotName = Literal["test", "parameter", "iterations", "tokens"]
CURVES: tuple[PlotName, ...] = ("iterations", "tokens")
"""Plots with a curve for each arm."""
MOST_CURVES = 12
"""That can be told apart by marker and line."""
BEST = "best"
"""The test of a run's best iteration."""
_OF_ARMS = ("base", "of", "test")
"""Keys of an arm that are none of the configuration."""
FIGURES = "figures"
"""A folder beside those of the arms."""
INDEXES = "indexes"
"""A folder beside those of the experiments, which share what is in it, as they do their worlds."""


class Spec(Section):
    """The keys of an experiment's file."""

    title: str
    """Heading of its part of the results."""
    about: str = ""
    """What is asked, in a sentence or two; stands below the heading."""
    base: str
    """Configuration that all arms start from: the name of a shipped one (demo), or a file, seen from this one."""
    world: Size | None = None
    """Size of a generated encyclopedia that all runs share. Null: the data are those of the configuration."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Keys of the configuration for all arms, in place of those of `base`."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of training. Each arm has a run for each."""
    arms: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    """Name of an arm -> keys of the configuration; or `of: ARM` and `test: NAME`: another test of that arm's runs."""
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Key of the configuration -> values: an arm for each value, of several keys for each combination."""
    baseline: str | None = None
    """The arm that the others are compared with. Null: the first."""
    metric: Metric = "em"
    """What is shown of dev and test questions."""
    tables: tuple[TableName, ...] = ("test", "hops", "types", "searches", "iterations", "cost")
    """Tables of the results."""
    plots: tuple[PlotName, ...] = ("test", "iterations")
    """Plots of the results."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the tables.

    Attributes:
        overrides: `key=value`, of an arm with runs of its own.
        base: in place of the experiment's.
        of: the arm whose runs are looked at; its own name where it has runs.
        test: which of their tests.
        values: of the keys that vary, where this arm is one of their combinations.
    """

    name: str
    of: str
    overrides: tuple[str, ...] = ()
    base: str | None = None
    test: str = BEST
    values: tuple[Any, ...] = ()

    @property
    def has_runs(self) -> bool:
        return self.of == self.name

    @property
    def folder(self) -> str:
        """Of its runs: the name without what shells and file systems take for something else."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name).strip("-.")


@dataclass(frozen=True, slots=True)
class Experiment:
    """A file that was read, with its arms in the order of the tables."""

    name: str
    file: Path
    spec: Spec
    arms: tuple[Arm, ...]

    @property
    def baseline(self) -> Arm:
        name = self.spec.baseline or self.arms[0].name
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def with_runs(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.has_runs]

    @property
    def varied_keys(self) -> set[str]:
        """Keys in which arms differ."""
        return {override.partition("=")[0] for arm in self.arms for override in arm.overrides}


def world_folder(size: Size) -> str:
    """Name of the folder of a generated world, beside those of the experiments."""
    return f"world-{size}"


def read_experiment(path: Path) -> Experiment:
    """
    Raises:
        UserError: no such file, or it does not say an experiment.
    """
    if not path.is_file():
        raise UserError(f"no experiment file {path}; the shipped ones are in {CONFIGS / 'experiments'}")
    tree = read_tree(path)
    for key in tree.keys() - Spec.model_fields.keys():
        raise UserError(f"{path}: unknown key {key}{suggestion(str(key), Spec.model_fields)}")
    try:
        spec = Spec.model_validate(tree)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise UserError(f"{path}: {'; '.join(problems)}") from error
    experiment = Experiment(path.stem, path, spec, (*_given(spec.arms, path), *_varied(spec.vary)))
    _check(experiment)
    return experiment


def overrides_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """As they stand on a command line. Sections may be nested; only the keys that are named are set."""
    return tuple(f"{key}={json.dumps(value, default=str)}" for key, value in flatten(settings).items())


def _given(arms: Mapping[str, Mapping[str, Any] | None], path: Path) -> Iterable[Arm]:
    for name, named in arms.items():
        settings = named or {}
        keys = {key: value for key, value in settings.items() if key not in _OF_ARMS}
        own = {key: str(settings[key]) for key in _OF_ARMS if key in settings}
        if "of" not in own:
            if "test" in own:
                raise UserError(f"{path}: arm {name}: `test` goes with `of: ARM`, the arm that is tested")
            yield Arm(name, name, overrides_of(keys), own.get("base"))
        elif keys or "base" in own:
            others = ", ".join([*keys, *(["base"] if "base" in own else [])])
            raise UserError(f"{path}: arm {name} looks at runs of {own['of']} and has no settings: {others}")
        else:
            yield Arm(name, own["of"], test=own.get("test", BEST))


def _varied(vary: Mapping[str, Sequence[Any]]) -> Iterable[Arm]:
    if not vary:
        return
    for values in itertools.product(*vary.values()):
        settings = dict(zip(vary, values, strict=True))
        # Named as an override is, by the last part of the key.
        name = ", ".join(f"{key.rsplit('.', 1)[-1]}={_in_words(value)}" for key, value in settings.items())
        yield Arm(name, name, overrides_of(settings), values=values)


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _check(experiment: Experiment) -> None:
    spec, path, arms = experiment.spec, experiment.file, experiment.arms
    if experiment.name in (INDEXES, *map(world_folder, get_args(Size))):
        raise UserError(
            f"{path}: the folder {experiment.name} is for something else; give the file another name"
        )
    names, with_runs = [arm.name for arm in arms], [arm.name for arm in experiment.with_runs]
    if not with_runs:
        raise UserError(f"{path} has no arms; name some under `arms`, or a key with its values under `vary`")
    for label, values in (("arm", names), ("folder", [arm.folder for arm in experiment.with_runs])):
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise UserError(f"{path}: two arms have the {label} {twice!r}; give them other names")
    if taken := next((arm.name for arm in experiment.with_runs if arm.folder == FIGURES), None):
        raise UserError(f"{path}: the folder {taken} is for something else; give the arm another name")
    if nameless := next((arm.name for arm in experiment.with_runs if not arm.folder), None):
        raise UserError(
            f"{path}: the arm {nameless!r} needs a name with letters or digits: it names a folder"
        )
    if len(set(spec.seeds)) < len(spec.seeds):
        raise UserError(f"{path}: seeds {list(spec.seeds)} name one twice")
    for arm in arms:
        if arm.of not in with_runs:
            raise UserError(f"{path}: arm {arm.name} is of {arm.of}{suggestion(arm.of, with_runs)}")
    if spec.baseline is not None and spec.baseline not in names:
        raise UserError(f"{path}: baseline {spec.baseline} is no arm{suggestion(spec.baseline, names)}")
    if "parameter" in spec.plots and len(spec.vary) != 1:
        raise UserError(f"{path}: the plot `parameter` needs exactly one key under `vary`")
    if len(with_runs) > MOST_CURVES and (drawn := [plot for plot in spec.plots if plot in CURVES]):
        raise UserError(
            f"{path}: {len(with_runs)} arms, and the plot `{drawn[0]}` tells {MOST_CURVES} curves apart; leave it out"
        )
