"""Where the files lie that come with the program: `configs/` and the demo's model."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

HOME = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""Of a checkout its root; a wheel has them within the package, where setup.py puts them. So they are found from any
working directory."""
IS_CHECKOUT = (HOME / "Makefile").is_file()
"""False where a wheel was installed."""
CONFIGS = HOME / "configs"
TINY_SEARCHER = HOME / "models" / "tiny-searcher"
