"""What a run looks at before its first step, what it warns of, and that its report has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.config.loading import load_config
from pipeline.core.data import run_check
from pipeline.core.data.run_check import look_at_data
from pipeline.core.data.splits import Splits
from pipeline.core.display import Display
from pipeline.core.records import Question

TRAIN = [Question("t", "Who founded Maker 1?", ("Ada",))]
TEST = [Question("x", "who founded  maker 1", ("Ada",)), Question("y", "Where?", ("Nowhere",))]


def look(run: Path, index: Path) -> dict[str, object]:
    look_at_data(run, load_config(None, []), Splits(TRAIN, [], TEST), index, Display())
    found: dict[str, object] = json.loads((run / "data.json").read_text())
    return found


def test_a_run_notes_its_coverage_and_warns_of_leaks(
    tmp_path: Path, index: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = look(tmp_path, index)
    assert found["coverage"]["test"]["percent"] == 50.0  # type: ignore[index]
    assert found["leaks"]["test"]["examples"] == [["t", "x"]]  # type: ignore[index]
    assert any("1 questions of test are also in train" in record.getMessage() for record in caplog.records)


def test_a_run_that_goes_on_does_not_look_again(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = look(tmp_path, index)
    monkeypatch.setattr(run_check, "open_index", None)
    assert look(tmp_path, index) == first


def test_a_corpus_that_takes_long_is_left_to_the_command(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_check, "MOST_PASSAGES", 3)
    assert "coverage" not in look(tmp_path, index)
    assert "see exsearch data check" in capsys.readouterr().err
