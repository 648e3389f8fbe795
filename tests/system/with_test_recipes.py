"""The command line, which also knows the recipes of tests/system/recipes."""

from __future__ import annotations

import importlib
from pathlib import Path

import ray.cloudpickle

import pipeline.recipes
from pipeline.cli import main


def add_recipes(folder: Path) -> None:
    """As if the files of the folder were in `pipeline/recipes`."""
    pipeline.recipes.__path__ = [*pipeline.recipes.__path__, str(folder)]
    for file in folder.glob("*.py"):
        # Ray's workers do not know the folder.
        module = importlib.import_module(f"pipeline.recipes.{file.stem}")
        ray.cloudpickle.register_pickle_by_value(module)


if __name__ == "__main__":
    add_recipes(Path(__file__).with_name("recipes"))
    main()
