"""Finds the recipe that a configuration names. A new file in `pipeline/recipes` is a new recipe; nothing lists them."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import pipeline.recipes
from pipeline.core.config import EXSEARCH, Config
from pipeline.core.config_loading import load_config
from pipeline.core.display import Display
from pipeline.core.errors import UserError
from pipeline.core.report import Outcome


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of any recipe; see `load_config`."""
    return load_config(path, overrides, settings_of=settings_of)


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run of the recipe that the configuration names."""
    outcome: Outcome = _module(config.recipe).train(config, run_path, display)
    return outcome


def names() -> list[str]:
    """Every recipe."""
    return [EXSEARCH, *sorted(module.name for module in pkgutil.iter_modules(pipeline.recipes.__path__))]


def settings_of(recipe: str) -> type[BaseModel]:
    """The model of a recipe's own section.

    Raises:
        UserError: no such recipe.
    """
    settings: type[BaseModel] = _module(recipe).Settings
    return settings


def _module(recipe: str) -> Any:
    if recipe not in names():
        near = difflib.get_close_matches(recipe, names(), n=1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise UserError(f"recipe: there is no {recipe}; {known}")
    # Heavy, and most commands need none of it.
    return importlib.import_module("pipeline.em" if recipe == EXSEARCH else f"pipeline.recipes.{recipe}")
