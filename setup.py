"""Puts the files that the program comes with into the wheel (`pipeline.core.shipped`); the rest: pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "models/tiny-searcher")


class WithShippedFiles(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in SHIPPED:
                shutil.copytree(name, Path(self.build_lib, "pipeline/shipped", name), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithShippedFiles})
