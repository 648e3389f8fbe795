"""Finds the recipe that a configuration names. A new file in `pipeline/recipes` is a new recipe; nothing lists them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel

import pipeline.recipes
from pipeline.core.config import EXSEARCH, Config
from pipeline.core.config_loading import load_config
from pipeline.core.display import Display
from pipeline.core.report import Outcome


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of any recipe; see `load_config`."""
    return load_config(path, overrides, recipes={name: partial(settings_of, name) for name in names()})


def train(config: Config, run_path: Path, display: Display) -> Outcome:
    """Run, or go on with, one run of the recipe that the configuration names."""
    # Heavy, and most commands need none of it.
    module = "pipeline.em" if config.recipe == EXSEARCH else f"pipeline.recipes.{config.recipe}"
    outcome: Outcome = importlib.import_module(module).train(config, run_path, display)
    return outcome


def names() -> list[str]:
    """Every recipe beside ExSearch."""
    return sorted(module.name for module in pkgutil.iter_modules(pipeline.recipes.__path__))


def settings_of(recipe: str) -> type[BaseModel]:
    """The model of a recipe's own section."""
    settings: type[BaseModel] = importlib.import_module(f"pipeline.recipes.{recipe}").Settings
    return settings
