"""Finds the recipe that a configuration names. A new file in `pipeline/recipes` is a new recipe; nothing lists them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

import pipeline.recipes
from pipeline.core.agents.program import Answering
from pipeline.core.agents.search import SEARCHER
from pipeline.core.agents.search_program import SearchProgram
from pipeline.core.config import EXSEARCH, AgentConfig, Config
from pipeline.core.config.loading import Files, load_config
from pipeline.core.display import Display
from pipeline.core.policies import PolicySpec
from pipeline.core.report import Outcome


def load(files: Files, overrides: Sequence[str] = ()) -> Config:
    """The configuration of any recipe; see `load_config`."""
    return load_config(files, overrides, recipes={name: partial(settings_of, name) for name in names()})


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run of the recipe that the configuration names."""
    outcome: Outcome = _module(config.recipe).train(config, run_path, display)
    return outcome


def answering(config: Config) -> Answering:
    """How the recipe's models answer a question: `answering` of its module, else the search agent by itself."""
    of_recipe: Callable[[Config], Answering] | None = getattr(_module(config.recipe), "answering", None)
    return of_recipe(config) if of_recipe else searching(config.agent, config.model.path)


def searching(agent: AgentConfig, model: str) -> Answering:
    """The search agent by itself, with one model."""
    return Answering(SearchProgram(agent), {SEARCHER: model}, SEARCHER)


def policies(config: Config) -> list[PolicySpec]:
    """The recipe's policies: `policies` of its module, else one searcher that is trained."""
    of_recipe: Callable[[Config], list[PolicySpec]] | None = getattr(_module(config.recipe), "policies", None)
    if of_recipe is not None:
        return of_recipe(config)
    return [PolicySpec(SEARCHER, config.model, config.rollout, config.learner)]


def names() -> list[str]:
    """Every recipe beside ExSearch."""
    return sorted(module.name for module in pkgutil.iter_modules(pipeline.recipes.__path__))


def settings_of(recipe: str) -> type[BaseModel]:
    """The model of a recipe's own section."""
    settings: type[BaseModel] = _module(recipe).Settings
    return settings


def _module(recipe: str) -> ModuleType:
    """Imported when it is needed: it is heavy, and most commands need none of it."""
    return importlib.import_module("pipeline.em" if recipe == EXSEARCH else f"pipeline.recipes.{recipe}")
