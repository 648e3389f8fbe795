"""What docs/serve.md shows runs as it stands there; its commands are checked with those of all pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pipeline.serve_support import QUESTION, serving

PAGE = Path(__file__).resolve().parents[3] / "docs" / "serve.md"


def test_the_example_in_python_prints_each_step_and_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with serving() as server:
        assert example.count("http://127.0.0.1:8080") == 1
        exec(compile(example.replace("http://127.0.0.1:8080", server.url), str(PAGE), "exec"), {})
    assert [question for question, _ in server.agent.asked] == [QUESTION]
    printed = capsys.readouterr().out
    assert "content='Mara Velin'" in printed and "Found for 'Who founded Orvane?'" in printed
