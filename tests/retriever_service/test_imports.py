"""Quick imports; small modules in a temporary folder stand in for large libraries."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from retriever_service.imports import quick_imports


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package that does without `exsearch_spare` where it is not installed. It is."""
    (tmp_path / "exsearch_spare.py").touch()
    (tmp_path / "exsearch_library.py").write_text(
        "import gc\nON = gc.isenabled()\n"
        "try:\n    import exsearch_spare as spare\nexcept ImportError:\n    spare = None"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "exsearch_library"
    for name in ("exsearch_spare", "exsearch_library"):
        sys.modules.pop(name, None)


def test_a_library_is_imported_without_the_collector_and_what_it_can_do_without(library: str) -> None:
    with quick_imports(without=["exsearch_spare"]):
        assert find_spec("exsearch_spare") is None
        module = importlib.import_module(library)

    assert (module.spare, module.ON) == (None, False)


def test_what_was_hidden_can_be_imported_afterwards(library: str) -> None:
    with quick_imports(without=["exsearch_spare"]):
        pass

    assert importlib.import_module(library).spare is not None


def test_what_somebody_has_imported_already_stays(library: str) -> None:
    spare = importlib.import_module("exsearch_spare")

    with quick_imports(without=["exsearch_spare"]):
        module = importlib.import_module(library)

    assert module.spare is spare


@pytest.mark.parametrize("was_on", [True, False])
def test_everything_is_as_it_was_also_behind_an_import_that_fails(library: str, was_on: bool) -> None:
    try:
        if not was_on:
            gc.disable()
        with pytest.raises(ModuleNotFoundError), quick_imports(without=["exsearch_spare"]):
            importlib.import_module("exsearch_is_not_there")
        assert gc.isenabled() is was_on
        assert importlib.import_module(library).spare is not None
    finally:
        gc.enable()
        gc.unfreeze()


def test_nothing_is_kept_from_the_collector_at_the_end_of_the_interpreter() -> None:
    """Else libraries whose types have references to each other print that these were leaked."""
    code = (
        "import atexit, gc\n"
        "atexit.register(lambda: print(frozen, gc.get_freeze_count()))\n"
        "from retriever_service.imports import quick_imports\n"
        "with quick_imports():\n    import decimal\n"
        "frozen = gc.get_freeze_count() > 0"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).split() == [
        "True",
        "0",
    ]


def test_what_transformers_counts_on_stays() -> None:
    """In a process of its own: what transformers has found out before the block is what it imports in it."""
    program = (
        "from transformers.utils.import_utils import is_scipy_available\n"
        "from retriever_service.imports import quick_imports\n"
        "assert is_scipy_available()\n"
        "with quick_imports():\n"
        "    from transformers import AttentionInterface\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
