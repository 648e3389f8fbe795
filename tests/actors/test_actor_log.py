"""The log of an actor: JSON lines of its own, whatever dies, and no harm where they cannot be written."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors import actor_log, metrics
from actors.actor_log import Identity, introduce, introduce_libraries
from actors.observer import Observer

LOGGER = logging.getLogger("actors.test")


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process is that no actor has begun in; afterwards it is again."""
    monkeypatch.setattr(actor_log, "_handler", None)
    monkeypatch.delenv("EXSEARCH_ACTOR", raising=False)
    loggers = [logging.getLogger(name) for name in ("", "actors", "pipeline", "retriever_service", "vllm")]
    before = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    metrics.belongs_to()
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def identity(at: Path, number: int = 0) -> Identity:
    return Identity("demo", str(at / "logs"), "rollout", "searcher", number)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_happened_and_to_whom(tmp_path: Path) -> None:
    introduce(identity(tmp_path, 3))
    try:
        raise ValueError("no such thing")
    except ValueError:
        LOGGER.exception("it failed: %s", 'a "quoted"\nword')
    begins, failed = lines(tmp_path / "logs" / "rollout-searcher-3.jsonl")
    assert begins["message"] == "begins"
    assert {
        key: failed[key] for key in ("actor", "kind", "policy", "number", "level", "logger", "message")
    } == {
        "actor": "rollout-searcher-3",
        "kind": "rollout",
        "policy": "searcher",
        "number": 3,
        "level": "ERROR",
        "logger": "actors.test",
        "message": 'it failed: a "quoted"\nword',
    }
    assert failed["exception"].startswith("Traceback") and failed["exception"].endswith("no such thing")
    assert failed["node"] and failed["pid"] and failed["time"].endswith("+00:00")


def test_of_other_libraries_only_warnings_are_kept(tmp_path: Path) -> None:
    introduce(identity(tmp_path))
    logging.getLogger().setLevel(logging.INFO)  # as a library may
    logging.getLogger("httpx").info("a request")
    logging.getLogger("httpx").warning("a slow request")
    LOGGER.info("ours")
    found = [line["message"] for line in lines(identity(tmp_path).path)]
    assert found == ["begins", "a slow request", "ours"]


def test_an_actor_that_takes_the_place_of_a_lost_one_goes_on_in_its_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for _ in range(2):
        child = context.Process(target=introduce, args=(identity(tmp_path),))
        child.start()
        child.join(120)
    first, second = lines(identity(tmp_path).path)
    assert first["message"] == second["message"] == "begins" and first["pid"] != second["pid"]


def test_who_begins_twice_is_heard_once(tmp_path: Path) -> None:
    for _ in range(2):
        introduce(identity(tmp_path))
    LOGGER.info("once")
    assert [line["message"] for line in lines(identity(tmp_path).path)].count("once") == 1


def test_a_library_with_handlers_of_its_own_is_heard_too(tmp_path: Path) -> None:
    vllm = logging.getLogger("vllm")
    introduce(identity(tmp_path))
    vllm.setLevel(logging.INFO)
    vllm.propagate = False  # as vLLM sets it when it is loaded
    for _ in range(2):
        introduce_libraries()
    vllm.info("KV cache: 12 blocks")
    assert [line["message"] for line in lines(identity(tmp_path).path)] == ["begins", "KV cache: 12 blocks"]


def test_what_belongs_to_no_run_writes_nothing(tmp_path: Path) -> None:
    introduce(Observer().identity("rollout", "searcher"))
    introduce_libraries()
    LOGGER.warning("heard elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_bounded_and_processes_that_share_it_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_log, "FILE_BYTES", 2000)
    path = identity(tmp_path).path
    introduce(identity(tmp_path))
    first = actor_log._handler
    monkeypatch.setattr(actor_log, "_handler", None)
    introduce(identity(tmp_path))  # as the engine's process would
    second = actor_log._handler
    assert first is not None and second is not None
    for number in range(40):
        for handler in (first, second):
            handler.handle(LOGGER.makeRecord("actors", logging.INFO, "", 0, f"{number}", None, None))
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.1"]
    assert all(file.stat().st_size <= 2000 for file in path.parent.iterdir())
    kept = [line["message"] for line in lines(path)]
    assert kept[-2:] == ["39", "39"]
    assert kept == sorted(kept, key=int)


def test_logs_that_do_not_arrive_are_said_once_and_nothing_else_happens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("in the way")
    observer = Observer(tmp_path)
    for _ in range(2):
        introduce(observer.identity("rollout", "searcher", 0))
        observer.is_up("rollout", "searcher", 0)
    said = [record.message for record in caplog.records if record.name == "actors.observer"]
    assert len(said) == 1 and "no log arrives of rollout-searcher-0; its node cannot write there" in said[0]


def test_logs_that_arrive_are_no_reason_for_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Observer(tmp_path)
    introduce(observer.identity("weighting"))
    observer.is_up("weighting")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
