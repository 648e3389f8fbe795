"""Imports of large libraries in less time."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# What the collector leaves alone it also leaves at the end of the interpreter, where some libraries complain of leaks.
atexit.register(gc.unfreeze)


def _was_found(name: str) -> bool:
    """By transformers, whose `is_NAME_available` remembers its answer."""
    utils = sys.modules.get("transformers.utils.import_utils")
    look = getattr(utils, f"is_{name}_available", None)
    remembered = getattr(look, "cache_info", None)
    return look is not None and remembered is not None and remembered().currsize > 0 and bool(look())


@contextmanager
def quick_imports(without: Sequence[str] = ("sklearn", "scipy")) -> Iterator[None]:
    """Around the first import of a library of thousands of modules.

    What modules hold lives as long as the process: the garbage collector looks through more and more of it and finds
    nothing. It is off in the block, and afterwards leaves alone what was there by its end.

    Args:
        without: packages that the library takes where it finds them, and that nobody here needs. In the block there are
            none of these, except those that are imported already, or that transformers has found before: it looks once,
            and then counts on them. It takes scikit-learn, and with it pandas, for a kind of generation that is not
            used here, and SciPy for a loss of another kind of models.
    """
    hidden = [name for name in without if name not in sys.modules and not _was_found(name)]
    before, was_on = len(sys.modules), gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: what is not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if len(sys.modules) > before:
            gc.freeze()
        if was_on:
            gc.enable()
