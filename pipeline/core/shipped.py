"""Where the files lie that come with the program: `configs/` and the demo's model."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import UserError, suggestion

_PACKAGE = Path(__file__).resolve().parents[1]

HOME = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""Of a checkout its root; a wheel has them within the package, where setup.py puts them. So they are found from any
working directory."""
IS_CHECKOUT = (HOME / "Makefile").is_file()
"""False where a wheel was installed."""
CONFIGS = HOME / "configs"
TINY_SEARCHER = HOME / "models" / "tiny-searcher"


def shipped_names(kind: str) -> list[str]:
    """The files of a folder of `configs/` ("benchmarks"), by their names."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def find_shipped(kind: str, which: str) -> Path:
    """The file that a person means: a path, or the name of a shipped one.

    Args:
        kind: a folder of `configs/`, in the plural ("benchmarks").

    Raises:
        UserError: there is none of that name.
    """
    if "/" in which or which.endswith((".yaml", ".yml")):
        return Path(which)
    if which in (known := shipped_names(kind)):
        return CONFIGS / kind / f"{which}.yaml"
    raise UserError(
        f"there is no {kind.removesuffix('s')} {which}{suggestion(which, known)} (a file of your own: ./{which}.yaml)"
    )
