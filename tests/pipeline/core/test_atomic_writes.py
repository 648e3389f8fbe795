"""A file of a run is there whole or not at all, whatever ends the process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.run import write_atomically, write_json


def test_a_file_is_written_with_the_folders_above_it(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"name": "caf\u00e9", "value": 1.5})
    assert json.loads((tmp_path / "a" / "b.json").read_text(encoding="utf-8")) == {
        "name": "caf\u00e9",
        "value": 1.5,
    }
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_write_that_is_cut_off_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        with pytest.raises(type(failure)):
            write_atomically(path, "new and longer")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    write_atomically(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]


def test_the_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def recorded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (calls.append(name), real(*arguments))[1]

    monkeypatch.setattr(os, "fsync", recorded("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", recorded("replace", os.replace))
    write_atomically(tmp_path / "x", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the last one makes the name survive too
