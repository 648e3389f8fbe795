"""What `exsearch serve` refuses before anything is started, and what it follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.core.run import write_json
from pipeline.serve.following import Following

SERVE = ("serve", "--model", "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve",), "--model DIR, or --follow RUN"),
        ((*SERVE, "--follow", "run"), "not both"),
        (("serve", "--follow", "nowhere"), "nowhere is not a run directory"),
        (("serve", "--model", "modle"), "there is model"),
        (SERVE, "give --index DIR, or --url ADDRESS"),
        ((*SERVE, "--url", "http://127.0.0.1:1"), "no answer from http://127.0.0.1:1"),
        ((*SERVE, "--url", "http://127.0.0.1:1", "--index", "index"), "leave one out"),
        ((*SERVE, "--index", "nowhere"), "nowhere"),
        ((*SERVE, "--token-file", "nowhere"), "--token-file nowhere cannot be read"),
        ((*SERVE, "--port", "99999"), "port 99999"),
        ((*SERVE, "--deadline", "0"), "deadline_s must be a number above 0"),
        ((*SERVE, "--deadline", "nan"), "deadline_s must be a number above 0"),
        ((*SERVE, "--grace", "inf"), "grace_s must be a number, and not below 0"),
        ((*SERVE, "--name", "two words"), "name"),
        ((*SERVE, "--allow-origin", "*"), "'*' is no origin"),
        ((*SERVE, "--allow-origin", "https://chat.example.org/"), "is no origin"),
        ((*SERVE, "--allow-origin", "chat.example.org"), "is no origin"),
        ((*SERVE, "--allowed-host", "https://chat.example.org"), "is no name of a host"),
        ((*SERVE, "--allowed-host", "chat.example.org:443"), "is no name of a host"),
        ((*SERVE, "agent.documants=3"), "agent.documents"),
    ],
)
def test_mistakes_are_refused_at_once(refused: Any, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments)


def test_an_empty_token_is_no_token(refused: Any, folder: Path) -> None:
    (folder / "token").write_text("\n")
    assert "the token must be" in refused(*SERVE, "--token-file", "token")


def test_the_newest_finished_iteration_of_a_run_is_followed(tmp_path: Path) -> None:
    following = Following(tmp_path)
    with pytest.raises(UserError, match="no trained searcher yet"):
        following.newest()
    for number in (1, 2, 3):
        (tmp_path / f"iterations/000{number}/searcher/model").mkdir(parents=True)
    for number in (1, 2):
        write_json(tmp_path / f"iterations/000{number}/searcher/train.json", {})
    found = following.newer(1)
    assert found is not None and found.version == 2 and found.model.endswith("0002/searcher/model")
    assert following.newer(2) is None
