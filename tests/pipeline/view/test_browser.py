"""The pages in a real browser: a headless Chromium opens exported files and prints what it made of them."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from pipeline.view.export import export
from pipeline.view.pages import Pages
from tests.pipeline.browser import CHROMIUM, FLAGS, needs_chromium
from tests.pipeline.view_support import HOSTILE, Writer, asked

pytestmark = [pytest.mark.component, needs_chromium]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    runs = [Writer(folder / name, asked(5)) for name in ("one", "two")]
    for number, writer in enumerate(runs):
        writer.sampled(1)
        writer.evaluated("test/best", "11000" if number else "10100")
    export(Pages([writer.path for writer in runs], live=False), folder / "out", lambda done, total: None)
    return folder / "out"


def opened(exported: Path, address: str, profile: Path) -> str:
    """The words of the page, behind its scripts."""
    assert CHROMIUM is not None
    url = f"file://{exported}/index.html#{address}"
    options = ["--virtual-time-budget=10000", f"--user-data-dir={profile}", "--dump-dom"]
    command = [CHROMIUM, *FLAGS, *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (main,) = re.findall(r"<main.*?</main>", done.stdout, re.DOTALL)
    text: str = html.unescape(re.sub(r"<[^>]*>", " ", main))
    assert "cannot be shown" not in text, text
    return " ".join(text.split())


def test_runs_beside_each_other(exported: Path, tmp_path: Path) -> None:
    text = opened(exported, "/", tmp_path)

    assert "2 runs" in text
    assert re.search(r"one exsearch \S+ .*two exsearch", text)


def test_questions_that_two_runs_answer_differently(exported: Path, tmp_path: Path) -> None:
    text = opened(exported, "/run/0/questions/test-best?against=1%2Ftest-best&kind=changed", tmp_path)

    assert "2 of 5 questions, 50.0 % right" in text
    assert re.search(r"Who founded 1\? Ada 1 nobody wrong 100\.0 %", text)
    assert re.search(r"Who founded 2\? Ada 2 Ada 2 right 0\.0 %", text)
    assert "Who founded 0?" not in text


def test_a_question_with_all_that_was_found_and_weighed(exported: Path, tmp_path: Path) -> None:
    text = opened(exported, f"/run/0/question/0001-rollouts/{quote('q0/ä?#', safe='')}", tmp_path)

    for words in (
        "Sample 1 right", "Sample 2 wrong", "88.1 % of the question's weight", "gold answer Ada 0",
        "trained: <think> Who founded it? </think>", "written, not trained: <answer> Ada 0 </answer>",
        "1 passages , 1 gold", HOSTILE, "two: samples of iteration 1",
    ):  # fmt: skip
        assert words in text, words


def test_an_address_that_is_none_says_so(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="there is no question nobody among these"):
        opened(exported, "/run/0/question/test-best/nobody", tmp_path)
